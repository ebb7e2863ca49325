"""`pt` to a remote place: files of consecutive steps travel at a time, each step's end behind its files."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import tlcore
from tests.waiting import wait_until
from tlcore.errors import BackendError
from tlcore.protocols import Buffer
from tlcore.testing import MemoryStore, make_run
from tlcore_backends.pt.sink import PtSink

from .test_sink import make_record, make_summary


class Far(MemoryStore):
    """Answers when it is open, refuses what it is told to, and remembers what was put in which order."""

    def __init__(self, refuses: str = "nothing") -> None:
        super().__init__()
        self.refuses = refuses
        self.order: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.most = self._now = 0
        self._lock = threading.Lock()

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self.open.wait(30)
        with self._lock:
            self._now -= 1
        if self.refuses in name:
            raise BackendError("refused on purpose")
        size = super().put(name, parts)
        self.order.append(name)
        return size

    def copy(self, source: str, target: str) -> None:
        super().copy(source, target)
        self.order.append(target)


def opened(store: Far, held: list[int] | None = None, **more: Any) -> tuple[PtSink, dict[int, Any]]:
    sink = PtSink()
    told: dict[int, Any] = {}
    run = replace(make_run("memory-store://run", store=store), **more)
    if held is not None:
        run = replace(run, hold=held.append)
    sink.open(run)
    # As the engine does: after it was opened.
    sink.tell_stored(told.__setitem__)
    return sink, told


def step(sink: PtSink, number: int, tensors: int = 2) -> None:
    records = [make_record(f"step_{number}/m/{i}_cpu", torch.full((3,), number)) for i in range(tensors)]
    again = make_record(f"step_{number}/n/0_cpu", torch.full((3,), number), alias_of=records[0].name)
    sink.write([*records, again])
    for record in records:
        # Its memory is the pipeline's, which uses it again.
        record.data[:] = b"\xff" * record.nbytes
    sink.commit_step(make_summary(number, ["m", "n"], {}))


def test_steps_overlap_and_each_end_comes_behind_its_files() -> None:
    store = Far()
    held: list[int] = []
    sink, told = opened(store, held)
    store.open.clear()
    for number in range(4):
        step(sink, number)
    wait_until(lambda: store.most > 4, "files of several steps travel at a time")
    assert told == {} and sum(held) > 0
    store.open.set()
    sink.close()
    assert told == dict.fromkeys(range(4)) and sum(held) == 0
    for number in range(4):
        own = list(dict.fromkeys(name for name in store.order if name.startswith(f"step_{number}/")))
        assert len(own) == 5 and own[-1] == f"step_{number}/step.json"
        assert own.index(f"step_{number}/n/0_cpu.pt") > own.index(f"step_{number}/m/0_cpu.pt")
        for name in own[:-1]:
            if name.endswith(".pt"):
                tensor = torch.load(io.BytesIO(store.blobs[name]), weights_only=True)
                assert torch.equal(tensor, torch.full((3,), number))


def test_a_step_of_which_a_file_is_refused_fails_alone() -> None:
    store = Far(refuses="step_1/m/1")
    sink, told = opened(store)
    for number in range(3):
        step(sink, number)
    sink.flush()
    assert told[0] is None and told[2] is None and "on purpose" in str(told[1])
    assert "step_1/step.json" not in store.blobs and "step_2/step.json" in store.blobs
    sink.close()


def test_only_a_few_steps_travel_and_no_more_bytes_than_the_queue_allows() -> None:
    store = Far()
    held: list[int] = []
    sink, _ = opened(store, held, queue_bytes=4000)
    store.open.clear()
    done: list[int] = []

    def many() -> None:
        for number in range(40):
            step(sink, number)
            done.append(number)

    thread = threading.Thread(target=many)
    thread.start()
    wait_until(lambda: sum(held) >= 2000, "half of the queue's bound travels")
    time.sleep(0.1)
    assert len(done) < 8 and sum(held) < 4000 + 4000
    store.open.set()
    thread.join(30)
    sink.close()
    assert sum(held) == 0 and len(done) == 40


def test_a_capture_to_a_place_that_answers_late_waits_for_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stores: dict[str, Far] = {}
    tlcore.register_store("late", lambda location: stores.setdefault(location.url, Far()))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with tlcore.capture(
        model, output_dir="late://place", module_call_match="^0$", log_step_ids=[]
    ) as captured:
        (store,) = stores.values()
        store.open.clear()
        for number in range(20):
            expected = model(torch.full((1, 2), float(number)))
        wait_until(lambda: store.most > 4, "files of several steps travel at a time")
        store.open.set()
        captured.session.flush()
    run = tlcore.open_run(captured.url)
    assert run.verify() == captured.ledger.stored == captured.ledger.captured == 40
    assert torch.equal(run.tensor("step_19/0/outputs_cpu"), expected)
