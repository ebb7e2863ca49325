"""Copies, pickles and questions of others while a capture is open: as without it."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def scaled(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, self.weight, self.bias) * 10


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


class Copies(nn.Module):
    """Calls ``act`` in the middle of its forward."""

    act: Any = None

    def __init__(self, partial: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)
        # A bound method of a plain function cannot be pickled, a partial can.
        bind: Any = functools.partial if partial else types.MethodType
        setattr(self.first, "forward", bind(scaled, self.first))  # noqa: B010
        self.third.register_forward_hook(doubled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if Copies.act is not None:
            Copies.act(self)
        out: torch.Tensor = self.third(self.second(x))
        return out


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


WAYS: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved,
    "average": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
    "in a container": lambda module: copy.deepcopy([module, module.second])[0],
}


@pytest.mark.parametrize("when", ["within", "between", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", ["root", "outermost", "method:act_on"])
def test_a_copy_is_what_it_would_be(way: str, when: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "act_on", lambda self, x: self(x), raising=False)
    make, module = WAYS[way], Copies(partial=way in ("pickle", "save"))
    right, plain = module(X), make(module)
    copies = []
    with tlcore.capture(module, backend=MemorySink(), log_step_ids=[], step=step) as capture:
        module.act_on(X)  # type: ignore[operator]
        if when == "within":
            monkeypatch.setattr(Copies, "act", lambda self: copies.append(make(self)))
        assert torch.equal(module.act_on(X), right)  # type: ignore[operator]
        monkeypatch.setattr(Copies, "act", None)
        if when == "between":
            copies.append(make(module))
        module.act_on(X)  # type: ignore[operator]
        assert len(capture.session.tree.modules) == 5  # type: ignore[union-attr]
    if when == "after":
        copies.append(make(module))
    (made,) = copies
    for each, like in zip(made.modules(), plain.modules(), strict=True):
        assert vars(each).keys() == vars(like).keys() and type(each) is type(like)
        assert len(each._forward_hooks) == len(like._forward_hooks)
    assert torch.equal(made(X), right)
    if way in ("pickle", "save"):
        assert b"tlcore.engine" not in pickle.dumps(made) and b"tlcore.hotpath" not in pickle.dumps(made)


def test_what_others_took_within_a_step_is_no_stand_in_in_their_copies() -> None:
    module: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def keep(part: Any, args: Any) -> None:
        part.old_forward = module[0].forward
        part.wrapped = functools.partial(module[0].forward)

    handle = module[1].register_forward_pre_hook(keep)
    right = module(X)
    with tlcore.capture(module, backend=MemorySink(), log_step_ids=[]):
        module(X)
    handle.remove()
    twin: Any = copy.deepcopy(module)
    assert twin[1].old_forward.__self__ is twin[0] and type(twin[1].old_forward) is types.MethodType
    assert b"hotpath" not in pickle.dumps(module)
    assert torch.equal(module[1].old_forward(X), module[0](X)) and torch.equal(twin(X), right)


def test_forward_is_inspected_as_without_capture() -> None:
    seen = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            forward: Any = self.part.forward
            signature, source = inspect.signature(forward), inspect.getsource(forward)
            method = isinstance(forward, types.MethodType) and inspect.ismethod(forward)
            seen.append((signature, source, method, forward.__name__, forward.__self__ is self.part))
            out: torch.Tensor = self.part(x)
            return out

    module = Looks()
    module(X)
    with tlcore.capture(module, backend=MemorySink()):
        module(X)
    assert seen[0] == seen[1]


NESTED = """
import sys, torch, tlcore
from torch import nn
from tests.sinks import MemorySink
class Nest(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.i = inner
    def forward(self, x):
        return self.i(x)
model = nn.Identity()
for _ in range(int(sys.argv[1])):
    model = Nest(model)
limit = sys.getrecursionlimit()
model(torch.ones(1))
sink = MemorySink()
with tlcore.capture(model, backend=sink, log_step_ids=[0, 2], step=sys.argv[2]) as capture:
    for _ in range(4):
        model(torch.ones(1))
    if sys.argv[2] == "root":
        model.i(torch.ones(1))
assert sys.getrecursionlimit() == limit
assert len(sink.steps) == 2 and len(sink.steps[0].calls) >= int(sys.argv[1]), len(sink.steps[0].calls)
assert capture.ledger.balanced and not capture.ledger.failed, capture.ledger
"""


@pytest.mark.parametrize("step", ["root", "outermost"])
def test_a_model_is_nested_as_deep_as_without_capture(step: str) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", NESTED, "240", step],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_fast_path_is_taken_as_without_capture_and_said() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 8)
    reasons: list[int] = []
    with torch.inference_mode():
        right = module(x)
        with tlcore.capture(module, backend=MemorySink()) as capture:
            assert torch.equal(module(x), right)
            reasons += [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules()]
    assert not any(reasons)
    assert any("self_attn" in each and "fast path" in each for each in capture.remarks)


@pytest.fixture
def fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("by", ["switch", "hook"])
def test_what_the_remark_advises_keeps_the_fast_path_off(by: str, fast_path: None) -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    if by == "switch":
        torch.backends.mha.set_fastpath_enabled(False)
    elif "hooks are attached" in inspect.getsource(type(module).forward):
        module.linear1.register_forward_hook(lambda *_: None)
    else:
        pytest.skip("this torch takes its fast path in spite of hooks")
    sink = MemorySink()
    with torch.inference_mode(), tlcore.capture(module, backend=sink) as capture:
        module(torch.randn(2, 3, 8))
    assert "self_attn" in sink.steps[0].calls and not any("fast path" in each for each in capture.remarks)


def test_a_model_copied_over_devices_at_each_call_is_refused() -> None:
    inner = nn.Linear(4, 4)
    module = nn.DataParallel(inner)
    module.device_ids = [0, 1]
    with pytest.raises(tlcore.CaptureError, match="DataParallel over several devices"):
        tlcore.capture(module, backend=MemorySink()).__enter__()
