"""Verifying many steps of a ``pt`` run at once: as step by step, whatever is wrong, with few documents."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.deep import scaled
from tests.rewriting import without_checksum
from tlcore.errors import ReadError, VerifyError
from tlcore.reader.documents import record_problem
from tlcore.reader.sound_records import SoundRecords
from tlcore.reader.stored import Stored
from tlcore_backends.pt import alike, source, whole_check
from tlcore_backends.pt.alike import cut
from tlcore_backends.pt.encode import encode
from tlcore_backends.pt.source import PtSource
from tlcore_backends.storage.step_files import StepFiles

STEPS = 6
STRANGE: list[Any] = [
    -1,
    0,
    1,
    7,
    64.0,
    1 << 40,
    1 << 70,
    True,
    None,
    "",
    "x",
    "step_1/",
    [],
    {},
    [0, 3],
    ["a\\"],
]


@pytest.fixture(autouse=True)
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a step are those of several threads, and begun early, however few they are."""
    monkeypatch.setattr(alike, "_LEAST_OF_PART", 1)
    monkeypatch.setattr(alike, "_LONG_TEXT", 1)
    monkeypatch.setattr(whole_check, "EARLY_BYTES", 1)
    monkeypatch.setattr(source, "_THREADS", 3)


class Inner(torch.nn.Module):
    def forward(self, x: torch.Tensor, count: int) -> Any:
        return {"x": x * 2, "step_2/a": x, 'q"': (x, count, None), "text": "as it is"}


class Outer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.empty = torch.nn.Linear(3, 3), torch.nn.Identity()
        self.inner = Inner()

    def forward(self, x: torch.Tensor, count: int) -> Any:
        self.empty(torch.empty(0, 4))
        return self.inner(self.plain(x), count)


def captured(folder: Path, **keys: Any) -> Path:
    torch.manual_seed(0)
    model = Outer()
    more: dict[str, Any] = {"output_dir": str(folder), "log_step_ids": [], **keys}
    with tlcore.capture(model, **more) as capture, torch.no_grad():
        for step in range(STEPS):
            # The fifth step has other shapes, and the count stands in a structure.
            model(torch.randn(2 + step // 5, 3), 1 + step // 3)
    return Path(capture.url)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without what needs escapes."""
    return captured(tmp_path_factory.mktemp("sound"), module_call_match=["plain", "empty"])


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, with its links."""
    return copy(sound, tmp_path / "run")


def copy(source: Path, target: Path) -> Path:
    made: dict[int, Path] = {}
    for file in sorted(each for each in source.rglob("*") if each.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        first = made.setdefault(file.stat().st_ino, place)
        if first is place:
            shutil.copyfile(file, place)
        else:
            os.link(first, place)
    return target


def found(run: Path) -> Any:
    """What verifying a run gives."""
    told = [0]

    def tell() -> None:
        told[0] += 1

    try:
        return tlcore.open_run(run).verify(tell), told
    except VerifyError as error:
        return error.bad, told
    except ReadError as error:
        return str(error)


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Verifies each file of each step by itself, and remembers nothing."""

    def verify(run: Path) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(PtSource, "whole_checks", lambda self, rank: iter(()))
            patch.setattr(PtSource, "structure_texts", lambda self, step, rank, names: [None] * len(names))
            patch.setattr(
                SoundRecords, "problem", lambda self, record, number: record_problem(record, number)
            )
            return found(run)

    return verify


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose documents were made."""
    steps: list[int] = []
    document = StepFiles.document

    def counted(files: StepFiles, step: int, rank: int) -> Any:
        steps.append(step)
        return document(files, step, rank)

    monkeypatch.setattr(StepFiles, "document", counted)
    return steps


def test_a_sound_run_is_verified_with_a_document_of_each_kind(
    run: Path, by_steps: Callable[[Path], Any], made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_steps(run)
    made.clear()
    assert found(run) == expected and expected[0] == expected[1][0] == 4 * STEPS
    assert made == [0, 5]
    monkeypatch.setattr(whole_check, "_STEPS", 2)
    made.clear()
    # Those of each window anew.
    assert found(run) == expected and made == [0, 2, 4, 5]


def test_structures_with_escapes_and_values_that_change_are_verified(
    tmp_path: Path, by_steps: Callable[[Path], Any], made: list[int]
) -> None:
    run = captured(tmp_path)
    expected = by_steps(run)
    made.clear()
    assert found(run) == expected and expected[0] > 10 * STEPS
    assert sorted(set(made)) == list(range(STEPS))


def test_every_changed_byte_is_told_as_step_by_step(run: Path, by_steps: Callable[[Path], Any]) -> None:
    chance, sound = random.Random(1), by_steps(run)
    files = sorted(each for each in run.rglob("step_*/**/*") if each.is_file())
    refused = 0
    for _ in range(scaled(80, 5000)):
        file = chance.choice(files)
        data = file.read_bytes()
        changed = bytearray(data)
        changed[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(changed)
        result = found(run)
        assert result == by_steps(run), file
        refused += result != sound
        file.write_bytes(data)
    assert refused > 30


def test_cut_off_missing_and_replaced_files_are_told_as_step_by_step(
    run: Path, by_steps: Callable[[Path], Any], tmp_path: Path
) -> None:
    sound = by_steps(run)
    files = sorted(each for each in run.rglob("step_[13]/**/*") if each.is_file())
    outside = tmp_path / "outside"
    for number, file in enumerate(files):
        data = file.read_bytes()
        outside.write_bytes(data)
        for way in range(4):
            file.unlink()
            if way == 0:
                file.write_bytes(data[: len(data) * (number % 3) // 2] + b"?" * (number % 3 == 2))
            elif way == 1:
                file.symlink_to(outside)
            elif way == 2:
                os.mkfifo(file)
            result = found(run)
            assert result == by_steps(run) != sound, (file, way)
            if way < 3:
                file.unlink()
            file.write_bytes(data)
    # What is the same bytes is sound, wherever its links lead.
    os.rename(run / "step_1" / "plain", run / "step_1" / "moved")
    (run / "step_1" / "plain").symlink_to("moved")
    assert found(run) == by_steps(run)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to each value of a document."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(each for key, child in items for each in places(child, (*path, key)))]


@pytest.mark.parametrize("name", ["step.json", "plain/inputs.json", "plain/outputs.json"])
def test_a_changed_document_is_told_as_step_by_step(
    run: Path, by_steps: Callable[[Path], Any], name: str
) -> None:
    chance, sound = random.Random(name), by_steps(run)
    refused = 0
    for _ in range(scaled(60, 10_000)):
        # The first step of a kind, or one that follows.
        file = run / f"step_{chance.choice([0, 2, 5])}" / name
        text = file.read_text()
        document = node = json.loads(without_checksum(text.encode()))
        path = chance.choice([path for path in places(document) if path])
        for key in path[:-1]:
            node = node[key]
        value = chance.choice(STRANGE)
        if chance.random() < 0.2 and isinstance(node, dict):
            node["step_2/" if chance.random() < 0.5 else "records"] = value
        node[path[-1]] = value
        # As it is written: the text is looked at, not only what it says.
        indent, separators = (1, None) if name != "step.json" else (None, (",", ":"))
        file.write_text(json.dumps(document, indent=indent, separators=separators))
        result = found(run)
        assert result == by_steps(run), (path, value)
        refused += result != sound
        file.write_text(text)
    assert refused > 20


TRICKS: list[Callable[[str], str]] = [
    lambda text: text.replace('"calls":', '"records":[],"calls":'),
    lambda text: text[:-1] + ',"records":[]}',
    lambda text: text[:-1] + ',"r\\u0065cords":[]}',
    lambda text: text[:-1] + ',"more":{"records":[{"hash":"xxh3-128:' + "0" * 32 + '","file_bytes":3}]}}',
    lambda text: text.replace('"layout":1,', '"layout":1,"more":{"records":[]},'),
    lambda text: text.replace('"module":"plain"', '"module":"step_3\\/plain"'),
    lambda text: text.replace('"module":"plain"', '"module":"step_3/plain"'),
    lambda text: text.replace('"file_bytes":', '"file_bytes":1,"file_bytes":', 1),
    lambda text: text.replace('"hash":"', '"hash":"xxh3-128:' + "1" * 32 + '","hash":"', 1),
    lambda text: text.replace('"bytes":', '"bytes":1e0,"bytes":', 1),
    lambda text: text.replace("xxh3-128:", "xxh3-128: ", 1),
    lambda text: text.replace("xxh3-128:", "XXH3-128:", 1),
    lambda text: text.upper(),
    lambda text: text + " " * 5,
    lambda text: text + "}",
    lambda text: text.replace('"shape":[2,3]', '"shape":[3,2]', 1),
    lambda text: text.replace('"shape":[2,3]', '"shape":[2.0,3]', 1),
    lambda text: text.replace('"dtype":"float32"', '"dtype":"int32"', 1),
    lambda text: text.replace("plain/inputs_0_cpu", "../plain/inputs_0_cpu"),
    lambda text: text.replace('"rows":', '"rows":3,"rows":'),
    lambda text: text.replace('"ledger":{', '"ledger":{"lost":-1,"captured":-1,', 1),
    lambda text: text.replace('"calls":["', '"calls":["../'),
    lambda text: text.replace("step_3/", "step_2/"),
    lambda text: text.replace('"name":"step_3/', '"name":"\0'),
    lambda text: text.replace('"module":"plain"', '"more":[{"a":1},{"name":"b"}],"module":"plain"'),
    lambda text: text[:-1] + ',"deep":' + "[" * 900 + "]" * 900 + "}",
]


@pytest.mark.parametrize("trick", range(len(TRICKS)))
def test_tricks_with_the_text_are_told_as_step_by_step(
    run: Path, by_steps: Callable[[Path], Any], trick: int
) -> None:
    for step in (0, 3):
        file = run / f"step_{step}" / "step.json"
        text = without_checksum(file.read_bytes()).decode()
        file.write_text(
            TRICKS[trick](text).replace("step_3/", f"step_{step}/") if step else TRICKS[trick](text)
        )
        assert found(run) == by_steps(run), step
        file.write_text(text)


def test_a_file_of_the_right_payload_in_another_frame_is_read_as_torch_reads_it(
    run: Path, by_steps: Callable[[Path], Any]
) -> None:
    file = next((run / "step_2").rglob("plain/outputs*.pt"))
    tensor = torch.load(file, weights_only=True)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"15728199511854643026", b"15728199511854643027"))
    assert found(run) == by_steps(run)
    payload = memoryview(tensor.numpy().tobytes())
    file.write_bytes(b"".join(encode(torch.int32, (2, 3), payload)))
    assert found(run) == by_steps(run) and "holds" in found(run)[0][0]


def test_a_text_is_cut_where_its_records_are(sound: Path) -> None:
    text = (sound / "step_2" / "step.json").read_bytes()
    parts = cut(text, b"step_2/")
    assert parts is not None
    document = json.loads(text)
    assert json.loads(parts.records) == document["records"]
    assert parts.rest == {**document, "records": []}
    assert [f"xxh3-128:{each}" for each in parts.hashes] == [each["hash"] for each in document["records"]]
    other = cut((sound / "step_3" / "step.json").read_bytes(), b"step_3/")
    assert other is not None and other.kind == parts.kind and other.hashes != parts.hashes


def structures_of(run: Path) -> Any:
    """All structures, or why they cannot be read."""
    opened = tlcore.open_run(run)
    try:
        return [step.structures(0) for step in opened.values()]
    except ReadError as error:
        return str(error)


def test_structures_read_together_are_those_read_one_by_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    structure = Stored.structure

    def counted(stored: Stored, step: int, rank: int, name: str) -> Any:
        asked.append(f"{step}/{name}")
        return structure(stored, step, rank, name)

    monkeypatch.setattr(Stored, "structure", counted)
    together = structures_of(run)
    # One of each kind is looked at: the fifth step's shapes are others.
    assert len(asked) < sum(map(len, together)) // 2
    strange = captured(tmp_path)
    several, damaged = [run, strange], [b"{", b'{"type":"tensor"}', b"[1]", b'{"type":"none"}\0', b"\xff"]
    for number, text in enumerate(damaged):
        several.append(copy(run, tmp_path / str(number)))
        next((several[-1] / "step_3").rglob("inputs.json")).write_bytes(text)
    with_texts = [structures_of(each) for each in several]
    monkeypatch.setattr(PtSource, "structure_texts", lambda self, step, rank, names: [None] * len(names))
    assert with_texts == [structures_of(each) for each in several] and with_texts[0] == together
    assert all(isinstance(each, str) for each in with_texts[2:])
