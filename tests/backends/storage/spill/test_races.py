"""`SpillStore` when things happen at once, threads do not start or files are gone; and `push` beside it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backends.storage.spill.test_store import recovered, spill
from tests.waiting import wait_until
from tlcore import registry
from tlcore.engine.run_documents import RunDocuments
from tlcore.errors import BackendError
from tlcore.record import SpillLocation
from tlcore.storage import Location
from tlcore.testing import FailingStore, MemoryStore, make_run
from tlcore_backends.storage.local import LocalStore
from tlcore_backends.storage.spill import push as pushing
from tlcore_backends.storage.spill import store as spilling
from tlcore_backends.storage.spill.store import SpillStore


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliveries begin at once."""
    monkeypatch.setattr(spilling, "_FIRST_PAUSE_S", 0.01)


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
    wait_until(lambda: "step_1/a" in place.blobs, "what spilled is delivered")
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
    wait_until(lambda: set(place.blobs) == {"step_0/a", "step_0/b"}, "both are delivered")
    wait_until(lambda: not (tmp_path / "spill/run-1/spill.json").exists(), "the note is removed")
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
    run = make_run("memory-store://", store=MemoryStore())
    failing = FailingStore(place, (method,), failures=1)
    store = Late(failing, run, SpillLocation(str(tmp_path / "spill"), 5.0))
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
    wait_until(lambda: not (root / "spill_rank_1.json").exists(), "the second rank has delivered")
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
    wait_until(lambda: "are left in" in caplog.text, "it is told")
    assert "cannot delete it" in caplog.text
    store.put("step_0/b", [b"b"])
    assert set(place.blobs) == {"step_0/a", "step_0/b"}


def test_a_run_whose_end_cannot_be_written_still_closes_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(FailingStore):
        closed = False

        def close(self) -> None:
            self.closed = True

    store = Closed(MemoryStore())
    monkeypatch.setitem(registry._stores, "closed", lambda location: store)
    documents = RunDocuments(make_run("closed://run", store=store), Location("closed://run"))
    with pytest.raises(BackendError, match="on purpose"):
        documents.close()
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


def test_what_a_closed_run_left_can_be_pushed_while_its_process_lives(tmp_path: Path, quick: None) -> None:
    place = MemoryStore()
    failing = FailingStore(place, ("put", "copy"), failures=0)
    store = spill(failing, tmp_path)
    store.put("run.json", [b"running"])
    failing.failures_left = None
    store.put("step_0/a", [b"a"])
    (run,) = pushing.spilled_runs(str(tmp_path / "spill"))
    assert run.owner_alive
    assert store.waiting is not None and store.waiting.startswith("1 files wait in ")
    store.close()
    (run,) = pushing.spilled_runs(str(tmp_path / "spill"))
    assert not run.owner_alive and "step_0/a" in run.files


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_what_a_process_left_that_nobody_has_asked_after_can_be_pushed(tmp_path: Path) -> None:
    """Of a container without an init, whose engine was killed too: its number is still there."""
    with subprocess.Popen(["sleep", "600"]) as process:
        note = {"url": "memory://somewhere", "host": socket.gethostname(), "pid": process.pid}
        (tmp_path / "spill.json").write_text(json.dumps(note))
        (run,) = pushing.spilled_runs(str(tmp_path))
        assert run.owner_alive
        process.kill()
        # Ended, and not asked after.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        (run,) = pushing.spilled_runs(str(tmp_path))
        assert not run.owner_alive
