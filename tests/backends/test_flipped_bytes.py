"""Whatever byte of a run is flipped, in any of its files, `verify` finds it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.deep import scaled
from tests.reading import command
from tlcore.config.configuration import load_config
from tlcore.errors import ReadError, VerifyError
from tlcore.layout.checksums import is_sound
from tlcore.registry import open_store
from tlcore.runs.convert import convert
from tlcore.storage import Store
from tlcore.testing import MemoryStore, RunWriter, make_record, make_run, make_summary
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.sink import SafetensorsSink

pytestmark = pytest.mark.slow

BACKENDS: dict[str, Any] = {
    "pt": "pt",
    "shards": {"name": "safetensors", "layout": 1},
    "segments": "safetensors",
    # Each of its steps has several data files.
    "large": {"name": "safetensors", "segment_bytes": 2000},
    "channels": "pt",
}
STEPS = 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.empty = nn.Linear(8, 8), nn.Linear(8, 8), nn.Identity()

    def forward(self, x: torch.Tensor, count: int) -> Any:
        self.empty(torch.zeros(0, 3))
        # A call without tensors has a structure all the same.
        self.empty(count)
        return {"y": self.second(self.first(x)), "count": count, "text": "ä\x1e"}


def captured(folder: Path, backend: str) -> Path:
    torch.manual_seed(0)
    model = Model()
    keys: dict[str, Any] = {"capture": "channels"} if backend == "channels" else {}
    with tlcore.capture(
        model,
        output_dir=str(folder),
        backend=BACKENDS[backend],
        module_call_match=".",
        log_step_ids=[],
        **keys,
    ) as capture:
        for step in range(STEPS):
            model(torch.randn(100 if backend == "large" else 3, 8), step)
    return Path(capture.url)


def two_ranks(url: Path, backend: str) -> Path:
    """A run of two ranks whose steps have rows and a further key."""
    sinks: dict[str, Callable[[], Any]] = {"pt": PtSink, "shards": SafetensorsSink, "segments": SegmentSink}
    for rank in (1, 0):
        label = "" if rank == 0 else "_rank_1"
        run = make_run(url, rank, world_size=2, run_id=url.name)
        sink = RunWriter(sinks[backend](), run=run, backend="pt" if backend == "pt" else "safetensors")
        for step in range(STEPS):
            records = [
                make_record(f"step_{step}/{name}/outputs_cpu{label}", torch.full((4,), step + 0.5), rank)
                for name in ("a", "b")
            ]
            sink.write(records)
            sink.commit_step(make_summary(step, records, rank, rows=[{"request_id": "r"}], note=0.1))
        sink.close()
    return url


def finds(store: Store) -> str:
    """What `verify` says of a run: nothing of one that is sound."""
    try:
        tlcore.reader.Run(store, tlcore.reader.run.run_document(store)).verify()
    except VerifyError as error:
        return "; ".join(error.bad)
    except ReadError as error:
        return str(error)
    return ""


def flips(data: bytes, name: str, count: int) -> Iterator[bytes]:
    """A document with one bit flipped: every part of it, and of a small one every byte, if there is time."""
    chance = random.Random(name)
    places = range(len(data))
    if len(data) > count:
        step = len(data) / count
        places = sorted({chance.randrange(int(n * step), int((n + 1) * step) or 1) for n in range(count)})  # type: ignore[assignment]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        yield bytes(flipped)


def passed(store: MemoryStore, count: int) -> list[str]:
    """Each flip that nobody noticed."""
    found = []
    for name, data in list(store.blobs.items()):
        for flipped in flips(data, name, count):
            store.blobs[name] = flipped
            if not finds(store):
                at = next(n for n in range(len(data)) if data[n] != flipped[n])
                found.append(f"{name} at {at} of {len(data)}: {data[max(0, at - 30) : at + 30]!r}")
        store.blobs[name] = data
    return found


def in_memory(run: Path) -> MemoryStore:
    store = MemoryStore()
    for file in sorted(run.rglob("*")):
        if file.is_file():
            store.blobs[str(file.relative_to(run))] = file.read_bytes()
    return store


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_byte_of_any_file_is_found(backend: str, tmp_path: Path) -> None:
    store = in_memory(captured(tmp_path, backend))
    assert finds(store) == ""
    assert passed(store, scaled(14, 300)) == []


@pytest.mark.parametrize("backend", ["pt", "shards", "segments"])
def test_of_several_ranks_too(backend: str, tmp_path: Path) -> None:
    store = in_memory(two_ranks(tmp_path / "run", backend))
    assert finds(store) == ""
    assert passed(store, scaled(10, 300)) == []


@pytest.mark.parametrize("backend", ["pt", "shards", "segments"])
def test_on_a_disk_where_many_steps_are_looked_at_together(backend: str, tmp_path: Path) -> None:
    """There much is read, told apart and hashed in C."""
    source = captured(tmp_path / "source", backend)
    chance = random.Random(backend)
    files = [each for each in sorted(source.rglob("*")) if each.is_file()]
    for number in range(scaled(60, 3000)):
        # As many of small files as of large ones.
        file = files[number % len(files)]
        data = bytearray(before := file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        assert finds(open_store(source)), f"{file.relative_to(source)}: {bytes(data)!r}"
        file.write_bytes(before)
    assert finds(open_store(source)) == ""


def as_tree(run: Path, place: Path) -> dict[str, bytes]:
    """The files of a run, converted to the documented tree."""
    made = Path(convert(tlcore.open_run(run), load_config(output_dir=str(place), backend="pt")))
    return {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*") if file.is_file()}


@pytest.mark.parametrize("backend", ["pt", "shards", "segments", "large", "channels", "ranks"])
def test_what_is_damaged_is_not_converted_unless_nothing_of_it_is_taken(backend: str, tmp_path: Path) -> None:
    """Bytes around a tensor are made anew; whatever else is damaged must not get a checksum that fits."""
    source = two_ranks(tmp_path / "run", "pt") if backend == "ranks" else captured(tmp_path / "a", backend)
    other = {"pt": "safetensors", "channels": "safetensors"}.get(backend, "pt")
    sound, chance = as_tree(source, tmp_path / "sound"), random.Random(backend)
    files = [each for each in sorted(source.rglob("*")) if each.is_file()]
    chosen = [*(each for each in files if each.parent == source), *chance.choices(files, k=scaled(8, 600))]
    for number, file in enumerate(chosen):
        data = bytearray(before := file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        place = tmp_path / str(number)
        with suppress(ReadError, VerifyError):
            config = load_config(output_dir=str(place), backend=other)
            made = convert(tlcore.open_run(source), config)
            shown = f"{file.relative_to(source)}: {bytes(data)!r}"
            assert as_tree(Path(made), place / "back") == sound, shown
        file.write_bytes(before)
        shutil.rmtree(place, ignore_errors=True)


def without_checksums(run: Path) -> None:
    """Make of a run what an earlier version would have written."""
    for file in [*run.rglob("*.json")]:
        document = json.loads(file.read_text())
        if is_sound(file.read_bytes()) is not None:
            del document["checksum"]
            for entry in (*document.get("files", ()), *document.get("shards", ())):
                entry.pop("head", None)
            document.pop("structures_hash", None)
        file.unlink()
        own = file.name == "run.json" or file.name in ("inputs.json", "outputs.json")
        text = json.dumps(document, indent=1) if own else json.dumps(document, separators=(",", ":"))
        file.write_text(text + "\n")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_of_an_earlier_version_is_sound_and_said_to_be_unchecked(backend: str, tmp_path: Path) -> None:
    run = captured(tmp_path, backend)
    checked = tlcore.open_run(run)
    tensors = checked.verify()
    assert checked.unchecked == []
    without_checksums(run)
    opened = tlcore.open_run(run)
    assert opened.verify() == tensors and opened.steps == list(range(STEPS))
    # Of segments the catalogue, too.
    assert len(opened.unchecked) == {"segments": 3, "large": 2 + STEPS}.get(backend, 1 + STEPS)
    assert "run.json" in opened.unchecked
    status, said = command("verify", str(run))
    assert status == 0 and f"without checksums: {len(opened.unchecked)} documents" in said
    assert json.loads(command("verify", str(run), "--json")[1])["unchecked"] == opened.unchecked


def test_a_document_that_another_program_has_written_anew_is_not_checked(tmp_path: Path) -> None:
    run = captured(tmp_path, "pt")
    file = run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "host": "elsewhere"}))
    opened = tlcore.open_run(run)
    assert opened.verify() and opened.unchecked == ["run.json"]


def test_who_reads_a_step_whose_document_was_changed_is_told(tmp_path: Path) -> None:
    """Not only `verify`: what an index or a ``step.json`` says is believed by everybody."""
    for backend, pattern in (
        ("pt", "step_1/step.json"),
        ("shards", "step_1/step.json"),
        ("segments", "*/*_steps_*"),
    ):
        run = captured(tmp_path / backend, backend)
        (file,) = run.glob(pattern)
        data = file.read_bytes().replace(b'"captured":', b'"captured":1', 1)
        file.unlink()
        file.write_bytes(data)
        with pytest.raises(ReadError, match="was changed since its checksum was written"):
            _ = tlcore.open_run(run).step(1).names


def test_converting_tells_of_a_structure_that_was_changed(tmp_path: Path) -> None:
    run = captured(tmp_path / "a", "pt")
    file = run / "step_1/first/inputs.json"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data.replace(b"cpu", b"cpv"))
    shutil.rmtree(run / "step_0")
    status, said = command("convert", str(run), str(tmp_path / "b"), "--backend", "safetensors")
    assert status == 2 and "a structure was changed" in said
