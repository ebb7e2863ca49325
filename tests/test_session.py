"""Capturing a plain PyTorch model: steps, calls, filters, faults, and leaving no trace."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.session import capture, new_run_id


class Shared(nn.Module):
    """Calls one linear three times and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.once = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.once(self.twice(self.twice(self.twice(x))))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def run(module: nn.Module, steps: int = 1, size: int = 4, **keys: Any) -> tuple[MemorySink, capture]:
    sink = keys.pop("backend", None) or MemorySink()
    with tlcore.capture(module, backend=sink, **keys) as captured:
        for _ in range(steps):
            module(torch.randn(2, size))
    assert captured.ledger.balanced
    return sink, captured


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_outputs_are_the_same_with_and_without_capture() -> None:
    module, x = model(), torch.randn(5, 4)
    plain = module(x)
    with tlcore.capture(module, backend=MemorySink(), log_step_ids=[]):
        assert torch.equal(module(x), plain)


def test_an_in_place_module_does_not_change_what_was_captured_before_it() -> None:
    module, x = model(), torch.randn(5, 4)
    sink = MemorySink()
    with tlcore.capture(module, backend=sink):
        module(x)
    first = module[0](x)
    assert torch.equal(sink.tensors["step_0/0/outputs_cpu"], first)
    assert torch.equal(sink.tensors["step_0/1/outputs_cpu"], first.relu())
    assert sink.steps[0].calls == ["0", "1", "2"]


def test_only_the_selected_steps_are_captured_and_hooks_live_no_longer() -> None:
    module, seen = model(), []
    module[0].register_forward_hook(lambda *_: seen.append(hook_count(module)))
    sink, _ = run(module, steps=4, log_step_ids=[1, 3])
    assert [step.step for step in sink.steps] == [1, 3]
    bracket = 1 + 2
    assert seen == [bracket, bracket + 6, bracket, bracket + 6]
    assert hook_count(module) == 1


def test_no_step_ids_means_all_steps() -> None:
    sink, _ = run(model(), steps=3, log_step_ids=[])
    assert [step.step for step in sink.steps] == [0, 1, 2]


def test_a_submodule_called_between_steps_belongs_to_no_step() -> None:
    module = model()
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, log_step_ids=[]) as captured:
        for _ in range(2):
            module(torch.randn(2, 4))
            module[0](torch.randn(2, 4))
    assert [step.calls for step in sink.steps] == [["0", "1", "2"]] * 2
    assert captured.ledger.captured == 12


def test_calls_of_a_shared_module_are_numbered() -> None:
    sink, _ = run(Shared(), size=3)
    assert sink.steps[0].calls == ["twice", "twice_1", "twice_2", "once"]


@pytest.mark.parametrize(
    ("patterns", "calls"),
    [
        ("twice:1", ["twice_1"]),
        (["twice:0", "twice:2"], ["twice", "twice_2"]),
        (["twice:1", "twice"], ["twice", "twice_1", "twice_2"]),
        ("(?:on|tw)ce:0", ["once"]),
        ("^o", ["once"]),
        ("nothing", []),
    ],
)
def test_patterns_select_exact_calls(patterns: Any, calls: list[str]) -> None:
    sink, _ = run(Shared(), size=3, module_call_match=patterns)
    assert sink.steps[0].calls == calls
    directions = {(r.module, r.call, r.direction) for r in sink.records.values()}
    assert len(directions) == 2 * len(calls)


def test_a_call_index_takes_that_calls_own_input_and_output() -> None:
    module = Shared()
    x = torch.randn(2, 3)
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, module_call_match="twice:1"):
        module(x)
    first = module.twice(x)
    assert torch.equal(sink.tensors["step_0/twice_1/inputs_0_cpu"], first)
    assert torch.equal(sink.tensors["step_0/twice_1/outputs_cpu"], module.twice(first))


def test_large_tensors_are_described_not_stored() -> None:
    sink, captured = run(Shared(), size=3, max_tensor_size=5)
    assert set(sink.tensors) == {"step_0/once/outputs_cpu"}
    assert (
        sink.steps[0].structures["once/inputs.json"]["items"][0]["skipped"] == "larger than max_tensor_size"
    )
    assert captured.ledger.skipped == 7 and captured.ledger.stored == 1


def test_a_run_stops_storing_at_max_run_bytes() -> None:
    sink, captured = run(Shared(), steps=3, size=3, log_step_ids=[], max_run_bytes=100)
    assert sum(t.nbytes for t in sink.tensors.values()) <= 100
    assert captured.ledger.reasons["skipped: max_run_bytes reached"] == captured.ledger.skipped > 0
    assert len(sink.steps) == 3


def test_other_devices_are_not_captured_at_all() -> None:
    sink, captured = run(model(), device_names=["cuda:0"])
    assert sink.tensors == {} and captured.ledger.captured == 0
    assert "device_names" in sink.steps[0].structures["0/outputs.json"]["skipped"]


def test_inputs_after_the_call() -> None:
    sink = MemorySink()
    module = model()
    with tlcore.capture(module, backend=sink, log_post_fwd_inputs=True):
        module(torch.randn(2, 4))
    before = sink.tensors["step_0/1/inputs_0_cpu"]
    assert torch.equal(sink.tensors["step_0/1/post_fwd_inputs_0_cpu"], before.relu())


def test_identical_tensors_are_marked_as_aliases() -> None:
    sink, captured = run(model())
    record = sink.records["step_0/2/inputs_0_cpu"]
    assert record.alias_of == "step_0/1/outputs_cpu"
    assert captured.ledger.bytes_stored < captured.ledger.bytes_captured


def test_equal_bytes_of_another_shape_are_no_alias() -> None:
    module = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (4, 2)))
    sink, _ = run(module)
    assert sink.records["step_0/0/outputs_cpu"].alias_of is None


class Recursive(nn.Module):
    def forward(self, depth: int) -> Any:
        if depth == 0:
            return torch.zeros(1)
        return self(depth - 1) + 1


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_a_recursive_module_pairs_each_result_with_its_call() -> None:
    sink = MemorySink()
    module = Holder(Recursive())
    with tlcore.capture(module, backend=sink):
        module(2)
    values = {name: tensor.item() for name, tensor in sink.tensors.items()}
    assert values == {
        "step_0/inner/outputs_cpu": 2.0,
        "step_0/inner_1/outputs_cpu": 1.0,
        "step_0/inner_2/outputs_cpu": 0.0,
    }


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fails = Fails(ValueError("no"))
        self.works = nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        with contextlib.suppress(ValueError):
            self.fails(x)
        return self.works(x)


def test_a_module_that_raises_keeps_its_inputs_and_says_so() -> None:
    sink, _ = run(Catches())
    structures = sink.steps[0].structures
    assert structures["fails/outputs.json"] == {"type": "object", "class": "raised builtins.ValueError"}
    assert "step_0/fails/inputs_0_cpu" in sink.tensors
    assert "step_0/works/outputs_cpu" in sink.tensors


def test_a_model_that_raises_commits_what_was_captured_and_raises_the_same() -> None:
    module = nn.Sequential(nn.Identity(), Fails(ZeroDivisionError("model's own")))
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, log_step_ids=[]) as captured:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="model's own"):
                module(torch.ones(2))
    assert [step.extra["error"] for step in sink.steps] == ["builtins.ZeroDivisionError"] * 2
    assert "step_1/0/outputs_cpu" in sink.tensors
    assert captured.ledger.balanced


def test_an_interrupt_in_the_model_does_not_end_the_capture() -> None:
    failing = Fails(KeyboardInterrupt())
    module = nn.Sequential(nn.Identity(), failing)
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, log_step_ids=[]):
        with pytest.raises(KeyboardInterrupt):
            module(torch.ones(2))
        module[1] = nn.Identity()
        module(torch.ones(2))
    assert [step.step for step in sink.steps] == [0, 1]
    assert "cut short" in sink.steps[0].extra["error"] and "error" not in sink.steps[1].extra


def test_a_result_of_none_while_an_older_exception_is_handled_is_a_result() -> None:
    module = Holder(nn.Module())
    module.inner.forward = lambda: None
    sink = MemorySink()
    with tlcore.capture(module, backend=sink):
        try:
            raise ValueError
        except ValueError:
            module()
    assert sink.steps[0].structures["inner/outputs.json"] == {"type": "none"}
    assert "error" not in sink.steps[0].extra


def test_the_root_itself_is_no_record_even_when_it_calls_itself() -> None:
    root = Recursive()
    root.child = nn.Identity()
    sink = MemorySink()
    with tlcore.capture(root, backend=sink, log_step_ids=[]):
        root(3)
    assert len(sink.steps) == 1 and sink.steps[0].calls == []


def test_training_goes_on_under_capture() -> None:
    module = model()
    sink = MemorySink()
    with tlcore.capture(module, backend=sink):
        module(torch.randn(2, 4).requires_grad_()).sum().backward()
    assert module[0].weight.grad is not None
    assert not any(t.requires_grad for t in sink.tensors.values())


def test_inference_mode_and_autocast() -> None:
    sink = MemorySink()
    module = model()
    with (
        tlcore.capture(module, backend=sink),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        module(torch.randn(2, 4))
    assert sink.tensors["step_0/0/outputs_cpu"].dtype == torch.bfloat16


def test_a_compiled_model_is_refused() -> None:
    module = model()
    module[2].compile()
    with pytest.raises(tlcore.CaptureError, match="'2' is compiled"):
        tlcore.capture(module, backend=MemorySink()).__enter__()
    assert hook_count(module) == 0


def test_disabled_means_no_hook_no_file_no_thread(tmp_path: Any) -> None:
    module, threads = model(), threading.active_count()
    with tlcore.capture(module, enabled=False, output_dir=str(tmp_path / "out")) as captured:
        module(torch.randn(1, 4))
        assert hook_count(module) == 0 and threading.active_count() == threads
    assert not (tmp_path / "out").exists()
    with pytest.raises(tlcore.CaptureError, match="enabled"):
        _ = captured.url


@pytest.mark.parametrize("where", ["write", "commit_step", "close"])
def test_a_failing_sink_changes_no_output_and_every_tensor_is_accounted_for(where: str) -> None:
    module, x = model(), torch.randn(2, 4)
    plain = module(x)
    sink = MemorySink(fail_at=where)
    with tlcore.capture(module, backend=sink, log_step_ids=[]) as captured:
        assert torch.equal(module(x), plain) and torch.equal(module(x), plain)
    counts = captured.ledger
    assert counts.balanced and counts.captured == 12
    assert counts.failed == (0 if where == "close" else 12)
    if where != "close":
        assert counts.reasons == {"failed: OSError": 12}


def test_on_error_raise_raises_at_close_never_in_forward() -> None:
    module = model()
    captured = tlcore.capture(module, backend=MemorySink(fail_at="write"), on_error="raise")
    captured.__enter__()
    module(torch.randn(2, 4))
    with pytest.raises(tlcore.CaptureError, match=r"6 tensors could not be stored: .*No space"):
        captured.__exit__(None, None, None)
    assert hook_count(module) == 0


def test_a_sink_that_cannot_open_stops_before_any_hook() -> None:
    module = model()
    with pytest.raises(OSError, match="No space"):
        tlcore.capture(module, backend=MemorySink(fail_at="open")).__enter__()
    assert hook_count(module) == 0


class SlowSink(MemorySink):
    def write(self, batch: Any) -> None:
        time.sleep(0.3)
        super().write(batch)


def test_a_slow_sink_drops_and_counts_when_told_to() -> None:
    module = nn.Sequential(*[nn.Identity() for _ in range(20)])
    x = torch.randn(64, 64)
    sink = SlowSink()
    keys: dict[str, Any] = {"log_step_ids": [], "queue_bytes": 40_000, "on_full": "drop"}
    with tlcore.capture(module, backend=sink, **keys) as captured:
        for _ in range(3):
            module(x + 1)
    counts = captured.ledger
    assert counts.balanced and counts.captured == 120 and counts.dropped > 0
    assert counts.reasons["dropped: queue full"] == counts.dropped
    assert len(sink.tensors) == counts.stored


def test_a_slow_sink_loses_nothing_when_the_model_may_wait() -> None:
    module = nn.Sequential(*[nn.Identity() for _ in range(5)])
    sink = SlowSink()
    with tlcore.capture(module, backend=sink, log_step_ids=[], queue_bytes=40_000) as captured:
        for _ in range(3):
            module(torch.randn(64, 64))
    assert captured.ledger.stored == captured.ledger.captured == 30


@pytest.mark.parametrize("inline", [True, False])
def test_inline_and_background_store_the_same(inline: bool) -> None:
    module, x = model(), torch.ones(3, 4)
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, inline=inline):
        module(x)
        if inline:
            assert len(sink.steps) == 1
    reference = MemorySink()
    with tlcore.capture(module, backend=reference):
        module(x)
    assert sink.tensors.keys() == reference.tensors.keys()
    assert all(torch.equal(sink.tensors[name], reference.tensors[name]) for name in sink.tensors)


def test_another_thread_is_not_mixed_in(caplog: pytest.LogCaptureFixture) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x[0] == 0:
                entered.set()
                go_on.wait(30)
            return x

    module = Holder(Waits())
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, log_step_ids=[]):
        other = threading.Thread(target=module, args=(torch.zeros(1),))
        other.start()
        entered.wait(30)
        module(torch.ones(1))
        go_on.set()
        other.join()
    assert len(sink.steps) == 1
    assert sink.tensors["step_0/inner/outputs_cpu"].item() == 0
    assert "several threads" in caplog.text


def test_run_ids_are_version_7_and_sort_by_time() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_run_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert all(uuid.UUID(i).version == 7 and uuid.UUID(i).variant == uuid.RFC_4122 for i in ids)


FORKS = """
import os, torch, tlcore
from torch import nn
from tests.sinks import MemorySink
module = nn.Sequential(nn.Linear(2, 2))
sink = MemorySink()
with tlcore.capture(module, backend=sink, log_step_ids=[]) as captured:
    module(torch.ones(1, 2))
    child = os.fork()
    if child == 0:
        module(torch.ones(1, 2))
        raise SystemExit(0 if not module[0]._forward_hooks else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    module(torch.ones(1, 2))
print(len(sink.steps), captured.ledger.balanced)
"""

EXITS = """
import torch, tlcore
from torch import nn
from tests.sinks import MemorySink
class Prints(MemorySink):
    def close(self):
        print("closed with", self.run.ledger.snapshot().stored)
module = nn.Sequential(nn.Linear(2, 2))
tlcore.capture(module, backend=Prints(), log_step_ids=[]).__enter__()
module(torch.ones(1, 2))
module(torch.ones(1, 2))
"""


@pytest.mark.parametrize(("program", "says"), [(FORKS, "2 True"), (EXITS, "closed with 4")])
def test_fork_and_exit_without_close(program: str, says: str) -> None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout), done.stdout + done.stderr


def test_an_object_that_is_no_sink_is_refused() -> None:
    with pytest.raises(tlcore.CaptureError, match="lacks open, write"):
        tlcore.capture(model(), backend=object())


def test_many_steps_keep_memory_flat() -> None:
    module = model()
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, log_step_ids=[], queue_bytes=1 << 20) as captured:
        for _ in range(300):
            module(torch.randn(2, 4))
        captured.session.flush()
        assert captured.session._pool.in_flight == 0
    assert captured.ledger.stored == 1800
