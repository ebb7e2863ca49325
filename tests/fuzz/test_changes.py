"""A model changed at random between steps: its outputs stay, and what is stored is what was handed on."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import tlcore
from tests.fuzz.settings import cases
from tests.sinks import MemorySink
from tlcore.hotpath.intercept import is_stand_in

pytestmark = pytest.mark.slow
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Part(nn.Module):
    """Adds a number; a twin made of the same numbers computes the same."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


class Chain(nn.Module):
    """Calls its parts, and notes what each was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(float(i)) for i in range(3))
        self.noted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.kept: list[Any] = []
        self.keep = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, part in enumerate(self.parts):
            if index == self.keep:
                # Within a step, as an offloading library may find it.
                self.kept.append(part.forward)
            given, x = x, part(x)
            self.noted[f"parts.{index}"] = (given.clone(), x.clone())
        return x


def attributes(module: nn.Module) -> list[str]:
    """A module's own. A class that copies its modules by itself may give them a None that says nothing."""
    return sorted(key for key, value in vars(module).items() if (key, value) != ("_compiled_call_impl", None))


def copied_attributes(made: nn.Module, chain: nn.Module) -> list[list[str]]:
    """The attributes of each module of a copy of ``chain``, or of its twin.

    Without a ``forward`` that somebody has kept within a step and put back between two: as any stand-in it is
    no part of a copy, since nothing there tells who has put it. The copy's class gives it the same one.
    """
    pairs = zip(made.modules(), chain.modules(), strict=True)
    put = [(module, is_stand_in(vars(origin).get("forward"))) for module, origin in pairs]
    return [[key for key in attributes(module) if not (back and key == "forward")] for module, back in put]


Change = Callable[[Chain, int, float, list[Any]], None]


def add_hook(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    handles.append(chain.parts[at].register_forward_hook(lambda m, i, o: o * number, prepend=number < 0))


def add_pre_hook(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    handles.append(chain.parts[at].register_forward_pre_hook(lambda m, args: (args[0] - number,)))


def remove_hook(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    if handles:
        handles.pop(at % len(handles)).remove()


def wrap(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    inner = chain.parts[at].forward
    setattr(chain.parts[at], "forward", functools.partial(lambda f, x: f(x) + number, inner))  # noqa: B010


def restore(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    vars(chain.parts[at]).pop("forward", None)


def put_back(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    found = [each for each in chain.kept if getattr(each, "__self__", None) is chain.parts[at]]
    if found:
        setattr(chain.parts[at], "forward", found[0])  # noqa: B010


def keep(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    chain.keep = at


def patch(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    # What was spliced in has no weight.
    bound = types.MethodType(lambda self, x: x * getattr(self, "weight", 0.5) + number, chain.parts[at])
    setattr(chain.parts[at], "forward", bound)  # noqa: B010


def replace(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    chain.parts[at] = Part(number)


def splice(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    chain.parts[at] = nn.Sequential(chain.parts[at], Part(number))


def share(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    chain.parts.append(chain.parts[at])


def parametrized(chain: Chain, at: int, number: float, handles: list[Any]) -> None:
    if isinstance(chain.parts[at], Part) and not parametrize.is_parametrized(chain.parts[at]):
        parametrize.register_parametrization(chain.parts[at], "weight", nn.Softplus())


CHANGES: list[Change] = [
    add_hook,
    add_pre_hook,
    remove_hook,
    wrap,
    restore,
    put_back,
    keep,
    patch,
    replace,
    splice,
    share,
    parametrized,
]
STEPS = st.lists(
    st.tuples(
        st.lists(
            st.tuples(st.sampled_from(CHANGES), st.integers(0, 2), st.sampled_from([-2.0, 0.5, 3.0])),
            max_size=3,
        ),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@cases(150, 10_000)
@given(steps=STEPS, ids=st.sets(st.integers(0, 5), min_size=1))
def test_any_changes_between_steps(steps: list[Any], ids: set[int]) -> None:
    chain, twin = Chain(), Chain()
    handles: tuple[list[Any], list[Any]] = ([], [])
    sink, noted = MemorySink(), {}
    with tlcore.capture(chain, backend=sink, log_step_ids=sorted(ids)) as capture, torch.no_grad():
        for number, (changes, copies) in enumerate(steps):
            for change, at, value in changes:
                for model, of_it in zip((chain, twin), handles, strict=True):
                    change(model, at, value, of_it)
            expected = twin(X)
            assert torch.equal(chain(X), expected)
            noted[number] = dict(chain.noted)
            if copies:
                made, like = copy.deepcopy(chain), copy.deepcopy(twin)
                assert copied_attributes(made, chain) == copied_attributes(like, chain)
                assert torch.equal(made(X), like(X))
    assert capture.ledger.balanced and not capture.ledger.failed
    assert list(map(attributes, chain.modules())) == list(map(attributes, twin.modules()))
    assert [step.step for step in sink.steps] == [n for n in range(len(steps)) if n in ids]
    for step in sink.steps:
        for name, (_, gave) in noted[step.step].items():
            # A module that occurs again is the next call of its first name.
            if f"step_{step.step}/{name}/outputs_cpu" in sink.tensors:
                assert torch.equal(sink.tensors[f"step_{step.step}/{name}/outputs_cpu"], gave)
        assert torch.equal(sink.tensors[f"step_{step.step}/_root/outputs_cpu"], gave)
