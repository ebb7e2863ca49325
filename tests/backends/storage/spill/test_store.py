"""`SpillStore` over a store that fails: nothing lost, and delivered in an order that never lies."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.waiting import join, wait_until
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.errors import BackendError, ConfigError
from tlcore.record import SpillLocation
from tlcore.testing import FailingStore, MemoryStore, SlowStore, StoreConformance, make_run
from tlcore_backends.storage.spill import push as pushing
from tlcore_backends.storage.spill.store import SpillStore


def spill(store: object, tmp_path: Path, patience_s: float = 0.5, rank: int = 0) -> SpillStore:
    run = make_run("memory-store://", rank=rank, world_size=2, store=MemoryStore())
    return SpillStore(store, run, SpillLocation(str(tmp_path / "spill" / run.run_id), patience_s))  # type: ignore[arg-type]


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


def test_a_place_for_spilling_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "spill").write_text("a file")
    store = spill(MemoryStore(), tmp_path)
    with pytest.raises(BackendError, match=f"spill_dir: {tmp_path}/spill is no directory; give another one"):
        store.put("run.json", [b"running"])


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
    for i in range(200):
        store.put(f"step_0/{i}", [b"x"])
    # Not even the patience is spent on each of them.
    assert time.monotonic() - begin < 10
    assert len(list((tmp_path / "spill/run-1/step_0").iterdir())) == 200


def test_memory_may_be_used_again_even_if_the_place_still_reads_it(tmp_path: Path) -> None:
    place = MemoryStore()
    store = spill(SlowStore(place, 0.5), tmp_path, patience_s=0.1)
    data = bytearray(b"first")
    store.put("step_0/a", [data])
    data[:] = b"other"
    wait_until(lambda: "step_0/a" in place.blobs, "the place has it")
    assert place.blobs["step_0/a"] == b"first"
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
    join(threads)
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
    with tlcore.capture(
        module, backend="safetensors", log_step_ids=[], **{"module_call_match": ".", **keys}
    ) as captured:
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


@pytest.mark.parametrize("own", [True, False])
def test_push_says_that_a_run_lies_in_two_places(
    own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "spill/run/step_1"
    directory.mkdir(parents=True)
    (directory / "a.pt").write_bytes(b"a")
    (tmp_path / "spill/run/spill.json").write_text(json.dumps({"url": str(tmp_path / "place/run")}))
    to = str(tmp_path / ("place" if own else "elsewhere"))
    assert main(["push", str(tmp_path / "spill"), "--to", to]) == 0
    said = f"what its capture had written before, or a push delivered, lies at {tmp_path / 'place/run'}"
    assert (said in capsys.readouterr().out) is not own


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
