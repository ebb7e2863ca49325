"""Reading tensors that are proven sound on the way: their bytes, or nothing where some are not."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.hotpath.gathering import gather_payloads
from tlcore_backends.pt import sound_tensors
from tlcore_backends.pt.decode import parts
from tlcore_backends.pt.sound_tensors import SoundTensors

Records = list[dict[str, Any]]


def _read(reader: SoundTensors, records: Records, known: dict[Hashable, str]) -> Any:
    prepared = reader.prepared(records, known)
    return None if prepared is None else prepared()


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Records]:
    """A run of one step, and its records: an alias is among them, and tensors of several forms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Identity(), nn.Flatten(0))
    with tlcore.capture(model, output_dir=str(tmp_path)) as capture:
        model(torch.randn(2, 5))
    path = Path(capture.url)
    records = tlcore.open_run(path).step(0).documents[0]["records"]
    assert 0 < sum("alias_of" in record for record in records) < len(records)
    return path, records


def test_all_but_aliases_have_their_bytes(run: tuple[Path, Records]) -> None:
    path, records = run
    source = tlcore.open_run(path).stored
    known: dict[Hashable, str] = {}
    found = _read(SoundTensors(str(path)), records, known)
    assert found is not None and set(known.values()) == {record["hash"] for record in records}
    for record, data in zip(records, found, strict=True):
        assert bytes(data) == (b"" if "alias_of" in record else bytes(source.read(record)))


def test_an_alias_of_what_was_read_before_is_not_read_again(
    run: tuple[Path, Records], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, records = run
    reader, known = SoundTensors(str(path)), dict[Hashable, str]()
    own = [record for record in records if "alias_of" not in record]
    aliases = [record for record in records if "alias_of" in record]
    assert _read(reader, own, known) is not None
    read: list[str] = []
    gather = gather_payloads

    def noted(directory: str, names: Any, *more: Any) -> Any:
        read.extend(names)
        return gather(directory, names, *more)

    monkeypatch.setattr(sound_tensors, "gather_payloads", noted)
    assert _read(reader, aliases, known) is not None and read == []
    # Of another file nothing is known, whatever its bytes.
    file = path / aliases[0]["file"]
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    assert _read(reader, aliases, known) is not None and read == [aliases[0]["file"]]


def flip(file: Path, data: bytearray, payload: int) -> None:
    data[payload] ^= 1
    file.write_bytes(data)


def reframe(file: Path, data: bytearray, payload: int) -> None:
    data[-1] ^= 1
    file.write_bytes(data)


def lead_away(file: Path, data: bytearray, payload: int) -> None:
    (file.parent / "other").write_bytes(data)
    file.symlink_to("other")


def cut_off(file: Path, data: bytearray, payload: int) -> None:
    file.write_bytes(data[:-1])


def append(file: Path, data: bytearray, payload: int) -> None:
    file.write_bytes(data + b" ")


WAYS: list[Callable[[Path, bytearray, int], None]] = [
    flip,
    reframe,
    lead_away,
    cut_off,
    append,
    lambda file, data, payload: None,
    lambda file, data, payload: os.mkfifo(file),
]


@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize("alias", [False, True])
def test_nothing_is_proven_where_a_file_is_another(run: tuple[Path, Records], way: int, alias: bool) -> None:
    path, records = run
    record = next(each for each in records if ("alias_of" in each) is alias)
    file = path / record["file"]
    data = bytearray(file.read_bytes())
    payload = bytes(data).find(bytes(parts(bytes(data))[2]))
    file.unlink()
    WAYS[way](file, data, payload)
    assert _read(SoundTensors(str(path)), records, {}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hash", "sha256:0"),
        ("hash", "xxh3-128:" + "0" * 32),
        ("dtype", "int32"),
        ("dtype", 3),
        ("shape", [3, 2]),
        ("shape", [True]),
        ("bytes", 1 << 70),
        ("file_bytes", 3),
        ("file", "../file.pt"),
        ("file", None),
    ],
)
def test_nothing_is_proven_of_a_record_that_says_otherwise(
    run: tuple[Path, Records], key: str, value: Any
) -> None:
    path, records = run
    records[0][key] = value
    assert _read(SoundTensors(str(path)), records, {}) is None
