"""Models that do what most do not: calls, changes and errors that a fast path might get wrong."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.hotpath.odd_values import MODELS, HandsOn, Returns


def model(kind: type[nn.Module]) -> type[nn.Module]:
    """Register a whole model."""
    MODELS[kind.__name__] = kind
    return kind


@model
class ChangesInPlace(nn.Module):
    """What was handed on is changed right after, by whoever had it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.ReLU(inplace=True)
        self.takes = HandsOn()

    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x).detach()
        z = self.second(y)
        y.add_(1)
        held = self.takes([y, {"y": y}])
        y.mul_(2)
        held.append(y.clone())
        held[1].clear()
        self.takes(held)
        y.set_(torch.zeros(1, 2))
        self.takes(y)
        y.data = torch.ones(5)
        return self.takes(y).sum() + z.sum()


@model
class ChangesContainers(nn.Module):
    """Inputs are taken apart by the module that got them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.eats = HandsOn(), Returns(self._eat)

    @staticmethod
    def _eat(given: Any) -> Any:
        given["list"].pop()
        given["more"] = given.pop("x")
        return given

    def forward(self, x: torch.Tensor) -> Any:
        given = {"x": x, "list": [x, x + 1]}
        self.eats(given)
        self.inner(**self.inner(x=x, y=given))
        return x + len(given)


@model
class ManyThreads(nn.Module):
    """Submodules are called by other threads, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        found: list[torch.Tensor] = []
        for part in self.parts:
            thread = threading.Thread(target=lambda part=part: found.append(part(x)))
            thread.start()
            thread.join(60)
        return sum(found, x)


@model
class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, depth: int = 4) -> Any:
        return self.linear(self(x, depth - 1)) if depth else x


@model
class Raises(nn.Module):
    """Errors of all kinds pass through modules."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"fails": Returns(self._fail), "outer": Returns(self._outer)})

    @staticmethod
    def _fail(x: Any) -> Any:
        raise x

    def _outer(self, x: Any) -> Any:
        return self.parts["fails"](x)

    def forward(self, x: torch.Tensor) -> Any:
        errors = ValueError("one"), KeyboardInterrupt(), GeneratorExit(), StopIteration(3), SystemExit(2)
        for error in errors:
            try:
                self.parts["outer"](error)
            except BaseException as caught:
                # Only the very same one counts, with where it came from.
                x = x + (caught is error and caught.__traceback__ is not None)
        return x


@model
class ChangesItself(nn.Module):
    """Hooks, submodules and forwards come and go during the call."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        handle = self.one.register_forward_hook(lambda module, given, result: result + 1)
        y = self.one(x)
        handle.remove()
        early = self.two.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
        y = self.two(self.one(y))
        early.remove()
        self.new = nn.ReLU()
        y = self.new(y)
        self.two = nn.Linear(3, 3, bias=False)
        nn.init.ones_(self.two.weight)
        y = self.two(y)
        self.one.__dict__["forward"] = lambda x: x - 1
        y = self.one(y)
        del self.one.forward, self.new
        return self.one(y)


@model
class Copied(nn.Module):
    """Is copied and pickled while it is captured, and the copies are called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> Any:
        y = copy.deepcopy(self.linear)(self.linear(x)) + copy.copy(self.norm)(x)
        y = y + pickle.loads(pickle.dumps(self.linear))(x)
        data = io.BytesIO()
        torch.save(self.norm, data)
        data.seek(0)
        return y + torch.load(data, weights_only=False)(x) + self.norm(y)


@model
class Shared(nn.Module):
    """One module under several names, and one that is equal to all."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.again = self.one
        self.many = nn.ModuleList([self.one, EqualToAll()])

    def forward(self, x: torch.Tensor) -> Any:
        return self.many[1](self.again(self.one(x)))


class EqualToAll(nn.Module):
    """Equal to all, empty, neither true nor false."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        raise TypeError("neither")

    def forward(self, x: torch.Tensor) -> Any:
        return x + 1


@model
class OddForwards(nn.Module):
    """Forwards that are no plain methods."""

    def __init__(self) -> None:
        super().__init__()
        self.static, self.slotted, self.called = Static(), nn.Identity(), Called()
        self.slotted.__dict__["forward"] = torch.nn.functional.relu
        self.scripted = torch.jit.script(nn.ReLU())
        self.traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            nn.Linear(3, 3), torch.zeros(2, 3)
        )

    def forward(self, x: torch.Tensor) -> Any:
        y = self.slotted(self.static(x)) + self.called(x)
        return self.traced(self.scripted(y)).detach()


class Static(nn.Module):
    """A static forward."""

    @staticmethod
    def forward(x: torch.Tensor) -> Any:
        return x + 1


class Called(nn.Module):
    """A class with a call of its own."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return super().__call__(*given, **named) + 1

    def forward(self, x: torch.Tensor) -> Any:
        return x * 2


@model
class Transforms(nn.Module):
    """Modules under vmap, grad, and forward-mode differentiation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.func.vmap(self.linear)(x)
        if torch.is_inference_mode_enabled():
            return y
        gradient = torch.func.grad(lambda each: self.linear(each).sum())(x)
        tangent = torch.func.jvp(self.linear, (x,), (x,))[1]
        weights = {"linear.weight": torch.ones(3, 3), "linear.bias": torch.zeros(3)}
        called = torch.func.functional_call(self, weights, (x,)) if x.sum() < -1e9 else x
        return (y + gradient + tangent + called).detach()


@model
class Trained(nn.Module):
    """A backward pass within the call, checkpointed and not, with parametrised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.again = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: torch.Tensor) -> Any:
        if torch.is_inference_mode_enabled():
            return self.again(self.linear(x))
        x = x.clone().requires_grad_()
        y = checkpoint(self.again, self.linear(x), use_reentrant=False)
        torch.autograd.backward(y.sum())
        assert x.grad is not None
        return (y + x.grad).detach()


@model
class Modes(nn.Module):
    """Calls under modes that see every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        with FlopCounterMode(display=False) as counter:
            y = self.linear(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.linear(x)
        with torch.inference_mode():
            inner = self.linear(x)
        with torch.device("meta"):
            self.linear(y)
        return y + z + inner + counter.get_total_flops()


@model
class Lazy(nn.Module):
    """Weights that are made at the first call; an attention that has a fast way; a recurrent net."""

    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(4)
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        y = self.lazy(x)[None]
        return (self.attention(y) + self.recurrent(y)[0]).detach()


@model
class Compiled(nn.Module):
    """Compiles, within its call, what calls a part."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x: torch.Tensor) -> Any:
        compiled = torch.compile(lambda given: self.inner(given) + 1, backend="eager")
        return compiled(self.linear(x)).detach()


@model
class Collects(nn.Module):
    """Python's collector runs in the middle, and what was handed on is gone at once."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = HandsOn()

    def forward(self, x: torch.Tensor) -> Any:
        for number in range(30):
            self.takes([x + number, {"n": (x, number)}])
            if number % 10 == 0:
                # What is young is what this call has made.
                gc.collect(1)
        return x


# Those that hand on odd values, and those that are odd themselves.
ALL = MODELS
