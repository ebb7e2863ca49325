"""`SpillStore` over a store that fails: nothing lost, and delivered in an order that never lies."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tlcore.errors import BackendError, ConfigError
from tlcore.record import SpillPlace
from tlcore.schema import load_config
from tlcore.testing import FailingStore, MemoryStore, SlowStore, StoreConformance, make_run
from tlcore_backends import push as pushing
from tlcore_backends import spill as spilling
from tlcore_backends.run_directory import RunDirectory
from tlcore_backends.spill import SpillStore
from tlcore_backends.stores import LocalStore


def spill(store: object, tmp_path: Path, patience_s: float = 0.5, rank: int = 0) -> SpillStore:
    run = make_run("memory-store://", rank=rank, world_size=2)
    return SpillStore(store, run, SpillPlace(str(tmp_path / "spill" / run.run_id), patience_s))  # type: ignore[arg-type]


class Recorder(MemoryStore):
    """Remembers the order in which blobs came."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def put(self, name: str, parts: object) -> int:
        self.order.append(name)
        return super().put(name, parts)  # type: ignore[arg-type]


class TestOverAStoreThatWorks(StoreConformance):
    def make_store(self, tmp_path: Path) -> SpillStore:
        return spill(MemoryStore(), tmp_path)


def recovered(store: SpillStore, failing: FailingStore) -> None:
    failing.failures_left = 0
    store.close()


def test_a_step_is_committed_after_its_files_and_the_run_at_the_end(tmp_path: Path) -> None:
    place = Recorder()
    failing = FailingStore(place, ("put", "copy"))
    store = spill(failing, tmp_path)
    failing.failures_left = 0
    store.put("run.json", [b"running"])
    failing.failures_left = None
    for name in ("step_10/z.pt", "step_10/step.json", "step_2/b.pt", "step_2/step.json", "run.json"):
        store.put(name, [name.encode()])
    store.copy("step_2/b.pt", "step_2/c.pt")
    recovered(store, failing)
    when = {name: place.order.index(name) for name in place.blobs}
    for step, files in (("step_2", ("b.pt", "c.pt")), ("step_10", ("z.pt",))):
        assert all(when[f"{step}/{file}"] < when[f"{step}/step.json"] for file in files)
    assert place.order[0] == place.order[-1] == "run.json"
    assert len(place.order) == len(place.blobs) + 1
    assert place.blobs["step_2/c.pt"] == b"step_2/b.pt" and place.blobs["run.json"] == b"run.json"
    assert not (tmp_path / "spill/run-1").exists()


def test_a_copy_of_what_is_there_already_is_kept_as_a_note(tmp_path: Path) -> None:
    place = MemoryStore()
    failing = FailingStore(place, ("put", "copy"), failures=0)
    store = spill(failing, tmp_path)
    store.put("step_0/a.pt", [b"a"])
    failing.failures_left = None
    store.put("step_0/b.pt", [b"b"])
    store.copy("step_0/a.pt", "step_0/c.pt")
    assert (tmp_path / "spill/run-1/step_0/c.pt.copy").read_bytes() == b"step_0/a.pt"
    recovered(store, failing)
    assert place.blobs == {"step_0/a.pt": b"a", "step_0/b.pt": b"b", "step_0/c.pt": b"a"}


def test_a_place_that_is_too_slow_counts_as_one_that_fails(tmp_path: Path) -> None:
    store = spill(SlowStore(MemoryStore(), 2.0), tmp_path, patience_s=0.1)
    begin = time.monotonic()
    for i in range(20):
        store.put(f"step_0/{i}", [b"x"])
    assert time.monotonic() - begin < 1.9
    assert len(list((tmp_path / "spill/run-1/step_0").iterdir())) == 20


def test_memory_may_be_used_again_even_if_the_place_still_reads_it(tmp_path: Path) -> None:
    place = MemoryStore()
    store = spill(SlowStore(place, 0.5), tmp_path, patience_s=0.1)
    data = bytearray(b"first")
    store.put("step_0/a", [data])
    data[:] = b"other"
    time.sleep(0.7)
    store.close()
    assert place.blobs["step_0/a"] == b"first"


def test_the_probe_is_never_spilled(tmp_path: Path) -> None:
    store = spill(FailingStore(MemoryStore()), tmp_path)
    with pytest.raises(BackendError, match="fails on purpose"):
        store.put("run.json", [b"running"])
    assert not (tmp_path / "spill").exists()


def test_when_the_directory_fails_too_both_are_named(tmp_path: Path) -> None:
    (tmp_path / "spill").write_text("in the way")
    store = spill(FailingStore(MemoryStore()), tmp_path)
    with pytest.raises(BackendError, match=r"spill.*and memory-store:// cannot be written: .*on purpose"):
        store.put("step_0/a.pt", [b"a"])


def test_many_threads_and_a_place_that_fails_every_other_time(tmp_path: Path) -> None:
    class Flaky(FailingStore):
        def before(self, method: str, name: str) -> None:
            if method == "put" and hash((name, self.calls)) % 2:
                self.calls += 1
                raise BackendError("sometimes")
            self.calls += 1

    place = MemoryStore()
    store = spill(Flaky(place), tmp_path)

    def work(n: int) -> None:
        for i in range(30):
            store.put(f"step_{i}/{n}.pt", [f"{n} {i}".encode()])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waiting = {run.path: run for run in pushing.spilled_runs(str(tmp_path / "spill"))}
    store.close()
    left = {
        str(path.relative_to(tmp_path / "spill/run-1")): path.read_bytes()
        for path in (tmp_path / "spill").rglob("*.pt")
    }
    assert {**place.blobs, **left} == {
        f"step_{i}/{n}.pt": f"{n} {i}".encode() for n in range(8) for i in range(30)
    }
    assert all(run.url == "memory-store://" for run in waiting.values())


def test_a_spilled_run_can_be_read_where_it_waits(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    keys: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "spill_dir": str(tmp_path / "spill"),
        "block_s": 1,
    }
    with tlcore.capture(module, backend="safetensors", log_step_ids=[], **keys) as captured:
        module(torch.ones(1, 2))
        captured.session.flush()
        run = Path(captured.url)
        run.rename(tmp_path / "moved")
        run.write_text("in the way")
        module(torch.ones(1, 2))
        captured.session.flush()
        (waiting,) = pushing.spilled_runs(str(tmp_path / "spill"))
        assert waiting.url == captured.url and waiting.owner_alive
        spilled = tlcore.open_run(waiting.path)
        assert spilled.steps == [1]
        assert spilled.verify() == 2
        run.unlink()
        (tmp_path / "moved").rename(run)
    assert captured.ledger.stored == captured.ledger.captured == 4
    whole = tlcore.open_run(captured.url)
    assert (whole.state, whole.steps, whole.verify()) == ("complete", [0, 1], 4)
    assert list((tmp_path / "spill").iterdir()) == []


def test_push_says_what_is_damaged_or_missing(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="there is no such directory"):
        pushing.spilled_runs(str(tmp_path / "nothing"))
    (tmp_path / "run").mkdir()
    assert pushing.spilled_runs(str(tmp_path)) == []
    (tmp_path / "run/spill.json").write_text("{")
    with pytest.raises(BackendError, match=r"spill\.json: damaged"):
        pushing.spilled_runs(str(tmp_path))
    (tmp_path / "run/spill.json").write_text(json.dumps({"url": "s3://***@bucket/run"}))
    (run,) = pushing.spilled_runs(str(tmp_path))
    with pytest.raises(BackendError, match="say where to deliver with --to"):
        pushing.push(run)
    (tmp_path / "run/step_0").mkdir()
    (tmp_path / "run/step_0/a.pt").write_bytes(b"a")
    (run,) = pushing.spilled_runs(str(tmp_path))
    pushing.push(run, to=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere/run/step_0/a.pt").read_bytes() == b"a"
    assert not (tmp_path / "run").exists()


def test_only_built_in_backends_and_local_directories_spill() -> None:
    with pytest.raises(ConfigError, match=r"\$.spill_dir: only the built-in backends can spill"):
        load_config(spill_dir="/tmp/spill", backend="tests.sinks:MemorySink")
    with pytest.raises(ConfigError, match=r"\$.spill_dir: "):
        load_config(spill_dir="s3://bucket/spill")
    assert load_config(spill_dir="/tmp/spill", output_dir="s3://b/p").spill_dir == "/tmp/spill"


def test_ranks_share_a_directory_and_keep_their_own_notes(tmp_path: Path) -> None:
    place = MemoryStore()
    failing = [FailingStore(place, ("put",)) for _ in range(2)]
    stores = [spill(failing[rank], tmp_path, rank=rank) for rank in range(2)]
    for rank, store in enumerate(stores):
        store.put(f"step_0/{rank}.pt", [b"x"])
    assert {path.name for path in (tmp_path / "spill/run-1").glob("*.json")} == {
        *("spill.json", "spill_rank_1.json")
    }
    recovered(stores[0], failing[0])
    assert (tmp_path / "spill/run-1/step_0/1.pt").exists()
    recovered(stores[1], failing[1])
    assert set(place.blobs) == {"step_0/0.pt", "step_0/1.pt"}
    assert not (tmp_path / "spill/run-1").exists()


def test_run_info_without_a_spill_place_is_unchanged() -> None:
    assert dataclasses.replace(make_run("x")).spill is None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliveries begin at once."""
    monkeypatch.setattr(spilling, "_FIRST_PAUSE_S", 0.01)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_outage_while_the_end_of_the_last_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    place = MemoryStore()
    failing = FailingStore(place, failures=1)
    store = spill(failing, tmp_path)

    def say(*_: object) -> None:
        # In the thread that delivers, which has not ended yet.
        if "step_1/a" not in place.blobs:
            failing.failures_left = 1
            store.put("step_1/a", [b"a"])

    monkeypatch.setattr(spilling.log, "info", say)
    store.put("step_0/a", [b"a"])
    until(lambda: "step_1/a" in place.blobs)
    store.close()
    assert not (tmp_path / "spill/run-1").exists()


def no_threads(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_where_no_thread_can_be_started_blobs_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    place = MemoryStore()
    store = spill(place, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_threads)
        store.put("step_0/a", [b"a"])
        assert (tmp_path / "spill/run-1/step_0/a").exists()
    store.put("step_0/b", [b"b"])
    until(lambda: set(place.blobs) == {"step_0/a", "step_0/b"})
    until(lambda: not (tmp_path / "spill/run-1/spill.json").exists())
    store.put("step_0/c", [b"c"])
    assert place.blobs["step_0/c"] == b"c"


@pytest.mark.parametrize("at_close", [True, False])
def test_close_tries_once_more_where_no_thread_could_be_started(
    at_close: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = MemoryStore()
    store = spill(place, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_threads)
        store.put("step_0/a", [b"a"])
        if not at_close:
            store.close()
    if at_close:
        store.close()
    assert set(place.blobs) == ({"step_0/a"} if at_close else set())
    assert (tmp_path / "spill/run-1/spill.json").exists() is not at_close
    assert ("no thread could be started" in caplog.text) is not at_close


@pytest.mark.parametrize("method", ["put", "copy"])
def test_spilling_does_not_end_before_a_blob_lies_there(method: str, tmp_path: Path, quick: None) -> None:
    class Late(SpillStore):
        """Gives the thread all the time to end between the decision to spill and the spilling."""

        def _done_there(self, call: Callable[[], object], nbytes: int) -> bool:
            done = super()._done_there(call, nbytes)
            for thread in threading.enumerate():
                if thread.name == "tlcore-spill":
                    thread.join(0.5)
            return done

    place = MemoryStore()
    place.put("step_0/a", [b"a"])
    run = make_run("memory-store://")
    failing = FailingStore(place, (method,), failures=1)
    store = Late(failing, run, SpillPlace(str(tmp_path / "spill"), 5.0))
    if method == "put":
        store.put("step_0/b", [b"a"])
    else:
        store.copy("step_0/a", "step_0/b")
    store.close()
    assert place.blobs["step_0/b"] == b"a"
    assert not (tmp_path / "spill").exists()


def test_a_rank_that_closes_takes_no_directory_from_the_others(tmp_path: Path, quick: None) -> None:
    place = MemoryStore()
    failing = [FailingStore(place) for _ in range(2)]
    stores = [spill(failing[rank], tmp_path, rank=rank) for rank in range(2)]
    root = tmp_path / "spill/run-1"
    for rank, store in enumerate(stores):
        store.put(f"step_0/{rank}", [b"a"])
    failing[1].failures_left = 0
    until(lambda: not (root / "spill_rank_1.json").exists())
    recovered(stores[0], failing[0])
    assert not root.exists()
    failing[1].failures_left = None
    stores[1].put("step_0/2", [b"a"])
    assert (root / "step_0/2").exists() and (root / "spill_rank_1.json").exists()
    recovered(stores[1], failing[1])
    assert set(place.blobs) == {"step_0/0", "step_0/1", "step_0/2"}


def test_a_blob_that_cannot_be_written_again_waits_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = MemoryStore()
    failing = FailingStore(place)
    store = spill(failing, tmp_path)
    store.put("step_0/a", [b"first"])

    def full(self: LocalStore, name: str, parts: object) -> int:
        raise BackendError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", full)
        with pytest.raises(BackendError, match="the disk is full"):
            store.put("step_0/a", [b"second"])
    recovered(store, failing)
    assert place.blobs == {"step_0/a": b"first"}


def test_a_copy_whose_source_was_pushed_is_kept_as_a_note(tmp_path: Path) -> None:
    place = MemoryStore()
    failing = FailingStore(place, ("put", "copy"))
    store = spill(failing, tmp_path)
    store.put("step_0/a", [b"a"])
    (tmp_path / "spill/run-1/step_0/a").unlink()
    place.put("step_0/a", [b"a"])
    store.copy("step_0/a", "step_0/b")
    recovered(store, failing)
    assert place.blobs == {"step_0/a": b"a", "step_0/b": b"a"}


def test_a_copy_that_waits_as_a_note_can_be_deleted(tmp_path: Path) -> None:
    place = MemoryStore()
    failing = FailingStore(place, ("put", "copy"), failures=0)
    store = spill(failing, tmp_path)
    store.put("step_0/a", [b"a"])
    failing.failures_left = None
    store.copy("step_0/a", "step_0/b")
    store.delete("step_0/b")
    recovered(store, failing)
    assert set(place.blobs) == {"step_0/a"}


def test_notes_that_cannot_be_removed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quick: None
) -> None:
    place = MemoryStore()
    store = spill(FailingStore(place, failures=1), tmp_path)
    original = LocalStore.delete

    def refuse(self: LocalStore, name: str) -> None:
        if name == "spill.json":
            raise BackendError("cannot delete it")
        original(self, name)

    monkeypatch.setattr(LocalStore, "delete", refuse)
    store.put("step_0/a", [b"a"])
    until(lambda: "are left in" in caplog.text)
    assert "cannot delete it" in caplog.text
    store.put("step_0/b", [b"b"])
    assert set(place.blobs) == {"step_0/a", "step_0/b"}


def test_a_run_whose_end_cannot_be_written_still_closes_its_store(tmp_path: Path) -> None:
    class Closed(FailingStore):
        closed = False

        def close(self) -> None:
            self.closed = True

    directory = RunDirectory(make_run(str(tmp_path / "run")), "pt")
    directory.store = store = Closed(MemoryStore())
    with pytest.raises(BackendError, match="on purpose"):
        directory.close()
    assert store.closed


def test_push_leaves_the_note_of_a_rank_that_spills_meanwhile(tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    (run / "step_0").mkdir(parents=True)
    note = json.dumps({"url": str(tmp_path / "place")})
    (run / "spill.json").write_text(note)
    (run / "step_0/0").write_bytes(b"a")
    (found,) = pushing.spilled_runs(str(tmp_path))

    def spill_too(name: str) -> None:
        (run / "spill_rank_1.json").write_text(note)
        (run / "step_0/1").write_bytes(b"b")

    pushing.push(found, on_delivered=spill_too)
    assert not (run / "spill.json").exists()
    (found,) = pushing.spilled_runs(str(tmp_path))
    assert found.files == ("step_0/1",)


def test_push_passes_over_what_its_owner_delivers_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1/spill.json").write_text(json.dumps({"url": "memory://x"}))
    original = LocalStore.get

    def too_late(self: LocalStore, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.delete(name)
        return original(self, name, start, end)

    monkeypatch.setattr(LocalStore, "get", too_late)
    assert pushing.spilled_runs(str(tmp_path)) == []
