"""Backends with two sides and stores of one's own: registered, found by name, and believed only so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore import registry
from tlcore.errors import BackendError, ConfigError, ReadError
from tlcore.protocols import StepRanks
from tlcore.reader import list_runs
from tlcore.record import RunInfo
from tlcore.storage import Location, Store, SupportsFiles
from tlcore.testing import BackendConformance, MemoryStore


class Told:
    """A source that tells what a class attribute holds."""

    documents: ClassVar[dict[int, Any]] = {}
    data: ClassVar[Any] = b""

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        self.steps = {step: StepRanks(frozenset({0})) for step in self.documents}

    def document(self, step: int, rank: int) -> Any:
        return self.documents[step]

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Any:
        if isinstance(self.data, Exception):
            raise self.data
        return self.data[begin:end]

    def remains(self, step: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def captured(place: Path, backend: str) -> tlcore.capture:
    model = nn.Linear(2, 2)
    with tlcore.capture(nn.Sequential(model), output_dir=str(place), backend=backend) as capture:
        capture._model(torch.ones(1, 2))
    return capture


def test_a_sink_alone_has_its_runs_listed_and_says_that_none_reads_them(tmp_path: Path) -> None:
    tlcore.register_sink("mine", MemorySink)
    capture = captured(tmp_path, "mine")
    (listed,) = list_runs(tmp_path)
    assert (listed.state, listed.captured) == ("complete", capture.ledger.captured)
    assert "no reader is registered for backend 'mine'" in str(listed.problem)
    run = tlcore.open_run(capture.url)
    assert (run.state, run.ledger) == ("complete", capture.ledger)
    for read in (lambda: run.steps, lambda: run.tensor("step_0/0/outputs_cpu"), run.verify):
        with pytest.raises(ReadError, match="no reader is registered for backend 'mine'"):
            read()


def test_an_import_path_in_a_run_is_never_followed(tmp_path: Path) -> None:
    url = Path(captured(tmp_path, "pt").url)
    document = json.loads((url / "run.json").read_text())
    for name in ("tests.test_two_sides:Told", "os:system", "no_such_module:x"):
        (url / "run.json").write_text(json.dumps({**document, "backend": name}))
        with pytest.raises(ReadError, match="an import path in a run is not followed"):
            _ = tlcore.open_run(url).steps
    (url / "run.json").write_text(json.dumps({**document, "backend": ["pt"]}))
    with pytest.raises(ReadError, match="'backend' is missing or no str"):
        _ = tlcore.open_run(url).steps


@pytest.mark.parametrize(
    ("documents", "data", "says"),
    [
        ({0: {"layout": 1}}, b"", "'calls' is missing"),
        ({0: "text"}, b"", "not written by tlcore"),
        (None, b"1234", "4 bytes, its record says 8"),
        (None, OSError("the disk is on fire"), "the disk is on fire"),
        (None, RuntimeError("a fault of theirs"), r"the reader of the backend 'told' failed \(RuntimeError"),
        (None, FileNotFoundError("gone"), "gone"),
    ],
)
def test_a_source_is_believed_only_as_far_as_it_makes_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Any, data: Any, says: str
) -> None:
    name = "step_0/0/outputs_cpu"
    record = {"name": name, "module": "0", "call": 0, "direction": "outputs", "path": [], "dtype": "float32"}
    record |= {"shape": [1, 2], "device": "cpu", "bytes": 8, "hash": "xxh3-128:0"}
    sound = {0: {"layout": 1, "calls": ["0"], "records": [record], "ledger": {}}}
    monkeypatch.setattr(Told, "documents", documents or sound)
    monkeypatch.setattr(Told, "data", data)
    tlcore.register_backend("told", sink=MemorySink, source=Told)
    run = tlcore.open_run(captured(tmp_path, "told").url)
    with pytest.raises(ReadError, match=says):
        run.tensor(name)
    with pytest.raises(ReadError):
        run.verify()


def test_a_backend_says_where_its_documents_lie(tmp_path: Path) -> None:
    def located(options: Mapping[str, Any], output_dir: str) -> Location:
        return Location(f"{output_dir}/documents")

    seen: list[RunInfo] = []

    class Here(MemorySink):
        def open(self, run: RunInfo) -> None:
            seen.append(run)
            super().open(run)

    tlcore.register_backend("mine", sink=Here, location=located)
    capture = captured(tmp_path, "mine")
    assert Path(capture.url).parent == tmp_path / "documents"
    assert isinstance(seen[0].store, SupportsFiles)
    assert seen[0].store.path() == capture.url
    tlcore.register_backend("bad", sink=MemorySink, location=lambda options, output_dir: 3)
    with pytest.raises(ConfigError, match="is a int, neither text nor Location"):
        captured(tmp_path, "bad")


def test_a_sink_that_cannot_be_opened_leaves_no_run(tmp_path: Path) -> None:
    tlcore.register_sink("mine", lambda: MemorySink("open"))
    with pytest.raises(OSError, match="No space left"):
        captured(tmp_path, "mine")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_sink_could_not_be_closed_reads_as_incomplete(tmp_path: Path) -> None:
    tlcore.register_sink("mine", lambda: MemorySink("close"))
    captured(tmp_path, "mine")
    (listed,) = list_runs(tmp_path)
    assert listed.state == "incomplete"


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_any_format_reaches_a_registered_store(backend: str) -> None:
    stores: dict[str, MemoryStore] = {}
    tlcore.register_store("mine", lambda location: stores.setdefault(location.url, MemoryStore()))
    model = nn.Sequential(nn.Linear(2, 2))
    with tlcore.capture(model, output_dir="mine://place", backend=backend) as capture:
        expected = model(torch.ones(1, 2))
    assert list(stores) == [capture.url] and capture.url.startswith("mine://place/")
    run = tlcore.open_run(capture.url)
    assert torch.equal(run.tensor("step_0/0/outputs_cpu"), expected)
    assert (run.state, run.verify()) == ("complete", capture.ledger.stored)


@pytest.mark.parametrize("scheme", ["file", "", "S3", "a b", "a://"])
def test_schemes_that_cannot_be_registered(scheme: str) -> None:
    with pytest.raises(BackendError):
        tlcore.register_store(scheme, lambda location: MemoryStore())
    with pytest.raises(BackendError, match="not callable"):
        tlcore.register_store("fine", MemoryStore())  # type: ignore[arg-type]


def test_an_entry_point_is_a_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_store.py").write_text(
        "from tlcore.testing import MemoryStore\nstore = MemoryStore()\nmake = lambda location: store\n"
    )
    info = tmp_path / "their_store-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-store\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tlcore.stores]\ntheirs = their_store:make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    opened = registry.open_store("theirs://somewhere")
    assert type(opened) is MemoryStore
    assert registry.open_store("THEIRS://elsewhere") is opened


def test_the_suite_finds_a_source_that_is_not_right(tmp_path: Path) -> None:
    from tlcore_backends.pt.sink import PtSink
    from tlcore_backends.pt.source import PtSource

    class Whole(PtSource):
        """Ignores the range that it is asked for."""

        def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Any:
            return super().read(record)

        stream = None  # type: ignore[assignment]

    class Suite(BackendConformance):
        backend = tlcore.Backend(sink=PtSink, source=Whole)

    tlcore.register_backend("backend-under-test", sink=PtSink, source=Whole)
    suite = Suite()
    suite.test_a_run_without_steps_can_be_closed(tmp_path / "a")
    with pytest.raises((AssertionError, ReadError)):
        suite.test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path / "b")
