"""Sinks that fail or lag, threads, forks and exits: no output changes, every tensor is accounted for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tests.toys import Holder, hook_count, model
from tests.waiting import join
from tlcore.engine.new_run import new_run_id
from tlcore.engine.pipeline import booking, executors


@pytest.mark.parametrize("where", ["write", "commit_step", "close"])
def test_a_failing_sink_changes_no_output_and_every_tensor_is_accounted_for(where: str) -> None:
    module, x = model(), torch.randn(2, 4)
    plain = module(x)
    sink = MemorySink(fail_at=where)
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]) as captured:
        assert torch.equal(module(x), plain) and torch.equal(module(x), plain)
    counts = captured.ledger
    assert counts.balanced and counts.captured == 12
    assert counts.failed == (0 if where == "close" else 12)
    if where != "close":
        assert counts.reasons == {"failed: OSError": 12}


def test_on_error_raise_raises_at_close_never_in_forward() -> None:
    module = model()
    captured = tlcore.capture(
        module, module_call_match=".", backend=MemorySink(fail_at="write"), on_error="raise"
    )
    captured.__enter__()
    module(torch.randn(2, 4))
    with pytest.raises(tlcore.CaptureError, match=r"6 tensors could not be stored: .*No space"):
        captured.__exit__(None, None, None)
    assert hook_count(module) == 0


def test_a_sink_that_cannot_open_stops_before_any_hook() -> None:
    module = model()
    with pytest.raises(OSError, match="No space"):
        tlcore.capture(module, module_call_match=".", backend=MemorySink(fail_at="open")).__enter__()
    assert hook_count(module) == 0


class SlowSink(MemorySink):
    def write(self, batch: Any) -> None:
        time.sleep(0.1)
        super().write(batch)


def test_a_slow_sink_drops_and_counts_when_told_to() -> None:
    module = nn.Sequential(*[nn.Identity() for _ in range(20)])
    x = torch.randn(64, 64)
    sink = SlowSink()
    keys: dict[str, Any] = {"log_step_ids": [], "queue_bytes": 40_000, "on_full": "drop"}
    with tlcore.capture(module, backend=sink, **{"module_call_match": ".", **keys}) as captured:
        for _ in range(3):
            module(x + 1)
    counts = captured.ledger
    assert counts.balanced and counts.captured == 120 and counts.dropped > 0
    assert counts.reasons["dropped: queue full"] == counts.dropped
    assert len(sink.tensors) == counts.stored


def test_a_slow_sink_loses_nothing_when_the_model_may_wait() -> None:
    module = nn.Sequential(*[nn.Identity() for _ in range(5)])
    sink = SlowSink()
    with tlcore.capture(
        module, module_call_match=".", backend=sink, log_step_ids=[], queue_bytes=40_000
    ) as captured:
        for _ in range(3):
            module(torch.randn(64, 64))
    assert captured.ledger.stored == captured.ledger.captured == 30


@pytest.mark.parametrize("inline", [True, False])
def test_inline_and_background_store_the_same(inline: bool) -> None:
    module, x = model(), torch.ones(3, 4)
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink, inline=inline):
        module(x)
        if inline:
            assert len(sink.steps) == 1
    reference = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=reference):
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
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]):
        other = threading.Thread(target=module, args=(torch.zeros(1),))
        other.start()
        entered.wait(30)
        module(torch.ones(1))
        go_on.set()
        join(other)
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
with tlcore.capture(module, backend=sink, module_call_match=".", log_step_ids=[]) as captured:
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
tlcore.capture(module, backend=Prints(), module_call_match=".", log_step_ids=[]).__enter__()
module(torch.ones(1, 2))
module(torch.ones(1, 2))
"""


@pytest.mark.parametrize(("program", "says"), [(FORKS, "2 True"), (EXITS, "closed with 4")])
def test_fork_and_exit_without_close(program: str, says: str) -> None:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
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
        tlcore.capture(model(), module_call_match=".", backend=object())


def test_many_steps_keep_memory_flat() -> None:
    module = model()
    sink = MemorySink()
    with tlcore.capture(
        module, module_call_match=".", backend=sink, log_step_ids=[], queue_bytes=1 << 20
    ) as captured:
        for _ in range(300):
            module(torch.randn(2, 4))
        captured.session.flush()
        assert captured.session._pool.in_flight == 0
    assert captured.ledger.stored == 1800


class Busy(MemorySink):
    """Every commit takes a while and fails, unless told to work."""

    works = False
    tries = 0

    def commit_step(self, step: Any) -> None:
        self.tries += 1
        if not self.works:
            time.sleep(0.1)
            raise OSError(5, "Input/output error")
        super().commit_step(step)


def test_what_waits_is_bounded_while_every_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_MOST_WAITING", 10)
    module, sink = model(), Busy()
    with tlcore.capture(
        module, module_call_match=".", backend=sink, log_step_ids=[], on_full="drop"
    ) as captured:
        for _ in range(500):
            module(torch.randn(2, 4))
        captured.session.flush()
        assert sink.tries < 400
        sink.works = True
        module(torch.randn(2, 4))
    assert captured.ledger.balanced and captured.ledger.captured == 501 * 6
    assert captured.ledger.stored == 6


def test_a_close_does_not_try_a_failing_sink_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_CLOSE_S", 0.2)
    module, sink = model(), Busy()
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]) as captured:
        for _ in range(40):
            module(torch.randn(2, 4))
    assert sink.tries < 36 and sink.closed
    assert captured.ledger.balanced and captured.ledger.failed == captured.ledger.captured == 240


def test_each_fault_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module, sink = model(), Busy()

    def steps(works: bool) -> None:
        sink.works = works
        for _ in range(3):
            module(torch.randn(2, 4))
        captured.session.flush()

    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]) as captured:
        steps(works=False)
        steps(works=True)
        steps(works=False)
        assert caplog.text.count("could not be stored") == 1
        monkeypatch.setattr(booking, "_QUIET_S", 0.0)
        steps(works=True)
        steps(works=False)
        assert caplog.text.count("could not be stored") == 2
    assert captured.ledger.stored == 36 and captured.ledger.failed == 54


def test_a_batch_that_cannot_be_named_or_read_is_still_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from tlcore.engine.pipeline.planner import Planner
    from tlcore.engine.staging.host_memory import Chunk

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    for owner, name in ((Chunk, "ready"), (Planner, "plan")):
        module, x = model(), torch.randn(2, 4)
        plain = module(x)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with tlcore.capture(module, module_call_match=".", backend=MemorySink()) as captured:
                assert torch.equal(module(x), plain)
        assert captured.ledger.balanced and captured.ledger.failed == captured.ledger.captured == 6
