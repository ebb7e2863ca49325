"""Converting a run: lossless, byte for byte the same after going there and back."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.errors import ReadError, VerifyError
from tlcore.reader import bulk
from tlcore.reader.bulk import Payload
from tlcore.registry import open_store
from tlcore.runs import conversion
from tlcore.runs.convert import convert
from tlcore.storage import Buffer
from tlcore.testing import RunWriter, every_dtype, make_record, make_run, make_summary
from tlcore_backends.pt.decode import parts
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.pt.source import PtSource
from tlcore_backends.safetensors import segment_sink
from tlcore_backends.safetensors.moved_files import MovedFiles
from tlcore_backends.safetensors.sink import SafetensorsSink
from tlcore_backends.storage.atomic_file import AtomicFile

_fresh = itertools.count()


def _nothing(source: PtSource, records: Any, known: Any) -> None:
    return None


def files(place: str | Path) -> dict[str, bytes]:
    """Every file of a run, whole."""
    store = open_store(place)
    return {entry.name: store.get(entry.name) for entry in store.list()}


def capture(output_dir: Path, backend: Any) -> Path:
    """A run with two steps of a model that calls one module twice and passes keywords on."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.Tensor(self.relu(self.relu(input=self.linear(x)).to(torch.bfloat16)))

    model = Model()
    keys: dict[str, Any] = {"log_step_ids": [], "log_post_fwd_inputs": True}
    with tlcore.capture(model, output_dir=str(output_dir), backend=backend, **keys) as capture:
        for _ in range(2):
            model(torch.randn(3, 4))
    return Path(capture.url)


def two_ranks(url: Path, kind: type[PtSink] | type[SafetensorsSink]) -> Path:
    """A run of two ranks with every dtype, an alias, rows and a further key in ``step.json``."""
    for rank in (1, 0):
        label = "" if rank == 0 else "_rank_1"
        records = [make_record(f"step_0/{n}/outputs_cpu{label}", t, rank) for n, t in every_dtype().items()]
        first = records[0]
        records.append(make_record(f"step_0/z/outputs_cpu{label}", first.tensor(), rank, alias_of=first.name))
        name = "pt" if kind is PtSink else "safetensors"
        sink = RunWriter(kind(), run=make_run(url, rank, world_size=2, run_id=url.name), backend=name)
        sink.write(records)
        sink.commit_step(make_summary(0, records, rank, rows=[{"request_id": "r"}], note=0.1))
        sink.close()
    return url


def converted(
    source: Path | str, target: Path | str, backend: str, capsys: pytest.CaptureFixture[str]
) -> str:
    assert main(["convert", str(source), str(target), "--backend", backend]) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(("own", "other"), [("pt", "safetensors"), ("safetensors", "pt")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_there_and_back_gives_the_same_bytes(
    tmp_path: Path, own: str, other: str, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds: dict[str, type[PtSink] | type[SafetensorsSink]] = {"pt": PtSink, "safetensors": SafetensorsSink}
    source = capture(tmp_path / "a", own) if ranks == 1 else two_ranks(tmp_path / "a" / "run-1", kinds[own])
    there = converted(source, tmp_path / "b", other, capsys)
    assert Path(there) == tmp_path / "b" / source.name
    before, after = tlcore.open_run(source), tlcore.open_run(there)
    assert json.loads(files(there)["run.json"])["backend"] == other
    assert after.verify() == before.verify()
    assert (after.ledger, after.state) == (before.ledger, "complete")
    back = converted(there, tmp_path / "c", own, capsys)
    if own == "pt":
        assert files(back) == files(source)
    else:
        # Where segments end depends on time; what is in them does not.
        assert files(converted(back, tmp_path / "d", "pt", capsys)) == files(there)


def test_through_object_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = capture(tmp_path / "a", "pt")
    parent = f"memory://convert-{next(_fresh)}"
    there = converted(source, parent, '{"name": "fsspec", "format": "safetensors"}', capsys)
    assert there == f"{parent}/{source.name}"
    plain = converted(there, f"{parent}/tree", "pt", capsys)
    assert files(plain) == files(source)
    assert files(converted(plain, tmp_path / "b", "pt", capsys)) == files(source)


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = capture(tmp_path / "a", "pt")
    before = files(source)
    assert main(["convert", str(source), str(tmp_path / "a"), "--backend", "safetensors"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["convert", str(source), str(source), "--backend", "safetensors"]) == 2
    assert "is a run itself; give the directory that the new one goes into" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "safetensor"]) == 2
    assert "no backend 'safetensor'" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "tests.sinks:MemorySink"]) == 2
    assert "has no reader" in capsys.readouterr().err
    assert files(source) == before
    document = json.loads(before["run.json"])
    (source / "run.json").write_text(json.dumps({**document, "state": "running"}))
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "pt"]) == 2
    assert "not complete" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_damage_is_found_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = capture(tmp_path / "a", "pt")
    torch.save(torch.zeros(3, 4), source / "step_1/linear/outputs_cpu.pt")
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "safetensors"]) == 2
    assert "step_1/linear/outputs_cpu" in capsys.readouterr().err
    assert tlcore.open_run(tmp_path / "b" / source.name).state == "incomplete"


@pytest.mark.parametrize("name", ["run.json", "close_rank_1.json"])
@pytest.mark.parametrize("own", ["pt", "safetensors"])
def test_a_damaged_document_of_the_run_gets_no_checksum_that_fits(
    tmp_path: Path, own: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = two_ranks(tmp_path / "a" / "run-1", PtSink if own == "pt" else SafetensorsSink)
    text = (source / name).read_text()
    # Read as well as before, and another.
    (source / name).write_text(text.replace('"skipped": 0', '"skipped": 7'))
    for other in ("pt", "safetensors"):
        assert main(["convert", str(source), str(tmp_path / "b"), "--backend", other]) == 2
        assert f"{name}: damaged, it was changed" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.fixture(params=["moved", "read"])
def large_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend for which every step is too large to share a segment; and both ways there."""
    if request.param == "read":
        monkeypatch.setattr(PtSource, "sound_move", _nothing)
    monkeypatch.setattr(segment_sink, "_LEAST_LARGE", 1)
    monkeypatch.setattr(bulk, "_GROUP_OF_MOVED", 100)
    monkeypatch.setattr(conversion, "_LOCAL_BATCH_BYTES", 1)
    monkeypatch.setattr(bulk, "_GROUP_OF_WHOLE", 1)
    write = AtomicFile.write

    def late(self: AtomicFile, parts: Sequence[Buffer]) -> int:
        # What is read meanwhile must have other memory.
        time.sleep(0.002)
        return write(self, parts)

    monkeypatch.setattr(AtomicFile, "write", late)
    return json.dumps({"name": "safetensors", "segment_bytes": 100})


def test_a_large_step_is_written_while_it_comes(
    tmp_path: Path, large_steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = capture(tmp_path / "a", "pt")
    there = converted(source, tmp_path / "b", large_steps, capsys)
    for number in (0, 1):
        records = tlcore.open_run(there).step(number).documents[0]["records"]
        assert any("alias_of" in record for record in records)
        # Each in several files of its own.
        assert len(list((Path(there) / "segments").glob(f"rank_0_00000{number}*.safetensors"))) > 1
    assert tlcore.open_run(there).verify() == 2 * len(tlcore.open_run(there).step(0).documents[0]["records"])
    assert files(converted(there, tmp_path / "c", "pt", capsys)) == files(source)


@pytest.mark.parametrize("large_steps", ["read"], indirect=True)
@pytest.mark.parametrize("number", [1, 4])
def test_a_write_that_fails_while_the_next_is_read_is_told(
    number: int,
    tmp_path: Path,
    large_steps: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = capture(tmp_path / "a", "pt")
    write, count = AtomicFile.write, itertools.count(1)

    def failing(self: AtomicFile, parts: Sequence[Buffer]) -> int:
        if self.target.endswith(".safetensors") and next(count) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, parts)

    monkeypatch.setattr(AtomicFile, "write", failing)
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", large_steps]) == 2
    assert "safetensors: No space left on device" in capsys.readouterr().err
    assert tlcore.open_run(tmp_path / "b" / source.name).state == "incomplete"
    assert not [*(tmp_path / "b").rglob("*.tmp")]


@pytest.mark.parametrize("linked", [True, False])
def test_another_name_that_was_changed_is_found_on_the_way(
    tmp_path: Path, linked: bool, large_steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = capture(tmp_path / "a", "pt")
    records = tlcore.open_run(source).step(1).documents[0]["records"]
    file = source / next(record["file"] for record in records if "alias_of" in record)
    data = bytearray(file.read_bytes())
    payload = parts(bytes(data))[2]
    data[data.find(payload) + 3] ^= 1
    if not linked:
        file.unlink()
    file.write_bytes(data)
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", large_steps]) == 2
    assert "step_1/" in capsys.readouterr().err
    assert tlcore.open_run(tmp_path / "b" / source.name).state == "incomplete"


def test_a_large_step_is_refused_as_a_small_one_is(
    tmp_path: Path, large_steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever byte of a tensor's file is another, told by who reads many at once and one by one."""
    source = capture(tmp_path / "a", "pt")
    chance, places = random.Random(3), itertools.count()
    tensors = sorted((source / "step_1").rglob("*.pt"))

    def outcome() -> Any:
        target = tmp_path / str(next(places))
        try:
            config = load_config(output_dir=str(target), backend=json.loads(large_steps))
            return files(convert(tlcore.open_run(source), config))
        except (ReadError, VerifyError) as error:
            return str(error).replace(str(target), "")

    sound, refused = outcome(), 0
    for number in range(30):
        file = chance.choice(tensors)
        data = file.read_bytes()
        payload = data.find(parts(data)[2])
        changed = bytearray(data)
        at = payload + chance.randrange(24) if number % 2 else chance.randrange(len(data))
        changed[at] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        found = outcome()
        with monkeypatch.context() as patch:
            patch.setattr(PtSource, "sound_read", _nothing)
            patch.setattr(PtSource, "sound_move", _nothing)
            assert found == outcome(), (file, at)
        refused += found != sound
        file.write_bytes(data)
    assert refused >= 15 and outcome() == sound


def test_what_is_moved_is_read_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(segment_sink, "_LEAST_LARGE", 1)
    backend = json.dumps({"name": "safetensors", "segment_bytes": 100})
    source = capture(tmp_path / "a", "pt")
    read: list[Any] = []
    read_many, publish = PtSource.read_many, MovedFiles.publish
    monkeypatch.setattr(PtSource, "sound_read", lambda *args: read.append("together"))

    def many(*args: Any) -> Any:
        read.append("one by one")
        return read_many(*args)

    monkeypatch.setattr(PtSource, "read_many", many)

    def noted(self: MovedFiles, published: Any) -> None:
        publish(self, published)
        read.append("moved")

    monkeypatch.setattr(MovedFiles, "publish", noted)
    converted(source, tmp_path / "b", backend, capsys)
    assert read == ["moved"] * 2
    # One that another tool has written again is sound, but not as it was: all of its step are read.
    read.clear()
    file = next((source / "step_0").rglob("*.pt"))
    torch.save(torch.load(file), tmp_path / "again.pt")
    file.write_bytes((tmp_path / "again.pt").read_bytes())
    there = converted(source, tmp_path / "c", backend, capsys)
    assert read.count("moved") == 1 and "one by one" in read
    files_of_both = [files(tmp_path / each / source.name) for each in "bc"]
    assert files_of_both[0] == files_of_both[1] == files(there)


def test_a_disk_that_is_full_while_tensors_are_moved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(segment_sink, "_LEAST_LARGE", 1)
    model = nn.Linear(256, 256)
    with tlcore.capture(model, output_dir=str(tmp_path / "a")) as taken:
        model(torch.randn(1024, 256))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))
    try:
        code = main(["convert", taken.url, str(tmp_path / "b"), "--backend", "safetensors"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "safetensors: File too large" in capsys.readouterr().err
    there = tmp_path / "b" / Path(taken.url).name
    assert tlcore.open_run(there).state == "incomplete"
    assert not [*there.rglob("*.tmp"), *there.rglob("*.safetensors")]


def test_what_has_another_dtype_is_no_alias() -> None:
    entries = [make_record(f"step_0/{name}/outputs_cpu", torch.ones(2)).describe() for name in "ab"]
    entries[1] |= {"dtype": "int32", "alias_of": entries[0]["name"]}
    data = memoryview(torch.ones(2).numpy().tobytes())
    payloads = [Payload(entry, data, entry["hash"].removeprefix("xxh3-128:")) for entry in entries]
    with pytest.raises(ReadError, match=r"step_0/b/outputs_cpu is no alias of 'step_0/a/outputs_cpu'"):
        list(conversion._records(payloads, 0, 0, hashed=True, known={}))


def test_structures_that_differ_in_their_own_directory_alone_stay_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts that look like a directory, escapes, and shapes that only some of them have."""

    class Part(nn.Module):
        def forward(self, x: torch.Tensor, note: str, name: dict[str, Any]) -> torch.Tensor:
            return x + 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: Part() for name in ("a", "b", "c", "é", "f\x7f", '"', "<")})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name, part in self.parts.items():
                for note in ("", f"step_0/parts.{name}/", "step_0/parts.b/", "./parts.b", "é\\"):
                    x = part(x, note, {"type": "tensor", "file": note, "name": [note, x]})
                x = torch.cat((part(x, "", {}), x[:1]))
            return x

    model = Model()
    with tlcore.capture(model, output_dir=str(tmp_path / "a"), backend="pt", log_step_ids=[]) as capture:
        for _ in range(2):
            model(torch.randn(3, 4))
    there = converted(Path(capture.url), tmp_path / "b", "safetensors", capsys)
    assert tlcore.open_run(there).verify() == tlcore.open_run(capture.url).verify()
    back = converted(there, tmp_path / "c", "pt", capsys)
    assert files(back) == files(capture.url)
    # Alone, where no earlier step is alike.
    own = tlcore.open_run(there).step(1).structures(0)
    assert own == tlcore.open_run(capture.url).step(1).structures(0)
    assert dict(tlcore.open_run(there).step(1).structure_texts(0)) == own
    assert dict(tlcore.open_run(capture.url).step(1).structure_texts(0)) == own
