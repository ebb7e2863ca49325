"""A model that others change between the steps of one capture: what is stored is what a module handed on."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tlcore
from tests.sinks import MemorySink
from tests.toys import hook_count, model
from tlcore.config.configuration import load_config
from tlcore.engine.hooks.listeners import ListenerSet
from tlcore.engine.hooks.module_tree import ModuleTree
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def everything(module: nn.Module, **keys: Any) -> tuple[MemorySink, tlcore.capture]:
    sink = MemorySink()
    return sink, tlcore.capture(module, backend=sink, log_step_ids=keys.pop("ids", []), **keys)


def parts(sink: MemorySink, step: int) -> list[str]:
    """The calls of a step but the model's own."""
    return [call for call in sink.steps[step].calls if not call.startswith("_root")]


class Noted(nn.Module):
    """Notes what its parts were given and gave, as their caller sees it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.noted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, part in list(self._modules.items()):
            assert part is not None
            given, x = x, part(x)
            self.noted[name] = (given.clone(), x.clone())
        return x


def hook(module: Noted) -> Any:
    return module.first.register_forward_hook(lambda m, i, o: o + 100)


def first_hook(module: Noted) -> Any:
    module.first.register_forward_hook(lambda m, i, o: o * 3)
    return module.first.register_forward_hook(lambda m, i, o: o + 100, prepend=True)


def always(module: Noted) -> Any:
    return module.first.register_forward_hook(lambda m, i, k, o: o + 1, with_kwargs=True, always_call=True)


def everywhere(module: Noted) -> Any:
    change = nn.modules.module.register_module_forward_hook
    return change(lambda m, i, o: o + 7 if isinstance(m, nn.Linear) else None)


def wrapped(module: Noted) -> Any:
    inner = module.first.forward
    module.first.forward = functools.partial(lambda f, x: f(x) + 5, inner)  # type: ignore[method-assign]


def bound(module: Noted) -> Any:
    module.first.forward = types.MethodType(lambda self, x: self.weight @ x.mT, module.first)  # type: ignore
    module.second = nn.Identity()  # type: ignore[assignment]


def of_the_class(module: Noted) -> Any:
    plain = nn.Linear.forward
    nn.Linear.forward = lambda self, x: plain(self, x) * 2  # type: ignore[method-assign,assignment]
    return types.SimpleNamespace(remove=lambda: setattr(nn.Linear, "forward", plain))


def replaced(module: Noted) -> Any:
    torch.manual_seed(1)
    module.first = nn.Sequential(module.first, nn.Linear(4, 4))  # type: ignore[assignment]


def parametrized(module: Noted) -> Any:
    parametrize.register_parametrization(module.first, "weight", nn.Softplus())


@pytest.mark.parametrize("ids", [[], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize(
    "change",
    [hook, first_hook, always, everywhere, wrapped, bound, of_the_class, replaced, parametrized],
)
def test_what_is_stored_is_what_the_module_handed_on(change: Callable[[Noted], Any], ids: list[int]) -> None:
    module = Noted()
    twin = Noted()
    sink, capture = everything(module, ids=ids)
    handle = None
    try:
        with capture, torch.no_grad():
            module(X)
            if ids == [0, 2]:
                module(X)
            handle = change(module)
            result = module(X)
    finally:
        if handle is not None:
            handle.remove()
    step = 2 if ids == [0, 2] else 1
    for name, (given, gave) in module.noted.items():
        assert torch.equal(sink.tensors[f"step_{step}/{name}/inputs_0_cpu"], given)
        assert torch.equal(sink.tensors[f"step_{step}/{name}/outputs_cpu"], gave)
    handle = change(twin)
    try:
        assert torch.equal(twin(X), result)
    finally:
        if handle is not None:
            handle.remove()


def test_a_hook_added_within_a_step_is_heard() -> None:
    module = Noted()
    sink, capture = everything(module)
    with capture, torch.no_grad(), capture.step():
        module(X)
        module.first.register_forward_hook(lambda m, i, o: o + 100)
        module(X)
    assert torch.equal(sink.tensors["step_0/first_1/outputs_cpu"], module.noted["first"][1])
    assert len(sink.steps) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_hook_that_raises_is_told_and_leaves_nothing(error: type[BaseException]) -> None:
    module = Noted()

    def raises(*_: Any) -> None:
        raise error

    sink, capture = everything(module)
    with capture, torch.no_grad():
        handle = module.first.register_forward_hook(raises)
        with pytest.raises(error):
            module(X)
        handle.remove()
        module(X)
    assert hook_count(module) == 0 and capture.ledger.balanced
    assert torch.equal(sink.tensors["step_1/first/outputs_cpu"], module.noted["first"][1])
    if error is ValueError:
        assert "raised" in str(dict(sink.steps[0].structures)["first/outputs.json"])


def test_a_forward_called_past_its_hooks_is_heard() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part.forward(x)

    module = Direct()
    module.part.register_forward_hook(lambda m, i, o: o + 100)
    sink, capture = everything(module)
    with capture:
        right = module(X)
    assert torch.equal(sink.tensors["step_0/part/outputs_cpu"], right) and hook_count(module) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forwards_that_are_wrapped_and_restored_in_any_order(order: tuple[int, int]) -> None:
    """As offloading libraries do, with what they found while a step ran."""
    module = Noted()
    right = module(X)
    found: list[Any] = []
    module.second.register_forward_pre_hook(lambda *_: found.append(module.first.forward))
    sink, capture = everything(module)
    with capture, torch.no_grad():
        module(X)
        for each in (found[-1], module.first.forward):
            setattr(module.first, "forward", functools.partial(lambda f, x: f(x), each))  # noqa: B010
            module(X)
        for index in order:
            setattr(module.first, "forward", found[index])  # noqa: B010
            assert torch.equal(module(X), right)
        del module.first.forward
        assert torch.equal(module(X), right)
    assert [parts(sink, step) for step in range(len(sink.steps))] == [["first", "second"]] * 6
    for step in range(6):
        assert torch.equal(sink.tensors[f"step_{step}/first/outputs_cpu"], module.noted["first"][1])
    setattr(module.first, "forward", found[0])  # noqa: B010
    assert torch.equal(module(X), right)


def test_new_modules_are_heard_and_gone_ones_are_said() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.idle = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    module = Picks()
    sink, capture = everything(module)
    with capture:
        module(X)
        module.parts[1] = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        module.parts.append(nn.Tanh())
        module.idle = nn.Sequential(module.idle)  # type: ignore[assignment]
        module(X)
    assert parts(sink, 0) == ["parts.0", "parts.1"]
    assert parts(sink, 1) == ["parts.0", "parts.1", "parts.1.0", "parts.1.1", "parts.2"]
    assert any("never called" in each and "idle" in each for each in capture.remarks)


def test_a_module_that_is_replaced_is_heard_by_the_name_that_others_give_it() -> None:
    """As in vLLM, where a layer with adapters goes by its own name."""
    module, sink = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), MemorySink()
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused"})
    session = Session(config, new_run(config), sink, inline=True)

    def names(model: nn.Module) -> dict[str, nn.Module]:
        return {f"layer.{name}": part for name, part in model.named_children() if name != "1"}

    session.attach(module, modules_of=names)
    wanted = []
    for _ in range(2):
        session.begin_step()
        module(X)
        session.end_step()
        wanted.append(module[0](X))
        module[0] = nn.Linear(4, 4)
    session.close()
    assert [step.calls for step in sink.steps] == [["_root", "layer.0"]] * 2
    for number, out in enumerate(wanted):
        assert torch.equal(sink.tensors[f"step_{number}/layer.0/outputs_cpu"], out)


def test_adapters_that_are_added_between_steps_are_heard() -> None:
    peft = pytest.importorskip("peft")
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    sink, capture = everything(module)
    with capture:
        module(X)
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], r=2), module)
        right = module(X)
    assert "0.lora_A.default" in sink.steps[1].calls and "0.base_layer" in sink.steps[1].calls
    assert torch.equal(sink.tensors["step_1/2/outputs_cpu"], right)


def test_hooks_of_accelerate_come_and_go() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Adds(hooks.ModelHook):  # type: ignore[misc,name-defined]
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output + 100

    module = Noted()
    plain = module(X)
    sink, capture = everything(module)
    with capture, torch.no_grad():
        module(X)
        hooks.add_hook_to_module(module.first, Adds())
        module(X)
        hooks.add_hook_to_module(module.first, Adds(), append=True)
        module(X)
        added = module.noted["first"][1]
        hooks.remove_hook_from_module(module.first)
        assert torch.equal(module(X), plain)
    given = [sink.tensors[f"step_{step}/first/outputs_cpu"] for step in range(4)]
    assert torch.equal(given[1], given[0] + 100) and torch.equal(given[2], added)
    assert torch.equal(given[3], given[0]) and torch.equal(added, given[0] + 100 + 100)
    assert "_old_forward" not in vars(module.first)


def test_looking_for_changes_takes_less_than_a_tenth_of_a_millisecond_for_400_modules() -> None:
    layers = [nn.Sequential(*(nn.Linear(1, 1) for _ in range(12))) for _ in range(31)]
    tree = ModuleTree(nn.Sequential(*layers))
    assert len(tree.modules) >= 400
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        assert tree.is_as_it_was()
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-4


def test_modules_may_be_shared_and_lie_in_circles() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    module.add_module("again", module[1])
    module[1].add_module("root", module)
    tree = ModuleTree(module)
    assert [each.name for each in tree.modules] == [name for name, _ in module.named_modules()]
    assert tree.modules[2].aliases == ("again",) and tree.modules[3].aliases == ("again.0",)
    assert tree.is_as_it_was()


def test_a_set_of_listeners_is_gone_after_each_step() -> None:
    module = model()
    listeners = ListenerSet(module, lambda each, names, hearing: None)
    with tlcore.capture(module, backend=MemorySink(), log_step_ids=[]):
        for _ in range(2):
            module(X)
            assert hook_count(module) == 0
    listeners.close()


class Direct(nn.Linear):
    """Calls its forward directly, past all hooks, as vLLM's classes made for compilation do."""

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


def test_a_module_that_passes_hooks_by_is_captured_and_still_does() -> None:
    module = nn.Sequential(Direct(4, 4))
    module[0].register_forward_hook(lambda own, args, output: output * 0)
    before, cls = module(X), type(module[0])
    sink, capture = everything(module)
    with capture:
        assert torch.equal(module(X), before)
        assert type(module[0]) is cls
    assert torch.equal(sink.tensors["step_0/0/outputs_cpu"], before)
