"""Tensor files made by an attacker: nothing in them runs, grows, or is believed without a check."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.hostile.files import TENSOR, edit, hostile, in_place_of, record, snapshot, sound
from tests.reading import attempt, read_all, run_commands
from tlcore.errors import VerifyError
from tlcore_backends.pt.decode import decode
from tlcore_backends.pt.zip_parts import PtError

__all__ = ["hostile", "sound"]

FILE = f"{TENSOR}.pt"


class Runs:
    """Unpickled, it would call ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return buffer.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        return {name: made.read(name) for name in made.namelist()}


def with_pickle(pickled: bytes, payload: bytes = bytes(24)) -> bytes:
    return archive({"archive/data.pkl": pickled, "archive/data/0": payload})


SOUND = contents(saved(torch.ones(2, 3)))
PICKLE = SOUND["archive/data.pkl"]
# bytearray(10**12): the unpickler of torch.load(weights_only=True) makes it.
HUGE_BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R."


def marker(directory: Path) -> Runs:
    return Runs(Path.touch, directory / "ran")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a zip archive"),
        (b"PK\x05\x06" + bytes(18), "not a torch.save archive"),
        (PICKLE, "not a zip archive"),
        (saved(OrderedDict(a=torch.ones(1))), "SETITEM"),
        (saved([torch.ones(1)]), "EMPTY_LIST|APPEND"),
        (saved({"a": 1}), "SETITEM"),
        (saved(None), "holds a NoneType, not a tensor"),
        (saved(torch.nn.Parameter(torch.ones(1))), "not a plain tensor"),
        (saved(torch.eye(2).to_sparse()), "SHORT|EMPTY|not a plain tensor"),
        (saved(torch.ones(2, 3).t()), "no plain contiguous tensor"),
        (saved(torch.ones(1).expand(10**12)), "no plain contiguous tensor"),
        (saved(torch.ones(6)[1:4]), "no plain contiguous tensor"),
        (with_pickle(HUGE_BYTEARRAY), "holds a bytearray, not a plain tensor"),
        (with_pickle(b"\x80\x02(" * 9000 + b"."), "damaged|not a tensor"),
        (with_pickle(b"\x80\x02)" + b"\x85" * 60_000 + b"."), "not a tensor"),
        (with_pickle(PICKLE.replace(b"K\x02K\x03", b"K\x04K\x03")), "contiguous|do not make"),
        (with_pickle(PICKLE, bytes(20)), "20 bytes do not make"),
        (with_pickle(PICKLE.replace(b"torch\nFloatStorage", b"os\nsystem")), "no plain contiguous"),
        (with_pickle(PICKLE[:-1]), "damaged"),
        (with_pickle(pickle.dumps(torch.Size([1]))), "which no plain tensor needs|not a"),
        (with_pickle(b"\x80\x02" + b"x" * 70_000), "too large for one tensor"),
        (with_pickle(b"q\x01."), "damaged"),
        (archive(SOUND, zipfile.ZIP_DEFLATED), "it is compressed"),
        (archive({f"{n}/x": b"" for n in range(5000)}), "directory is damaged"),
        (archive({"archive/data.pkl": PICKLE}), "payload is missing"),
        (archive({**SOUND, "other/data.pkl": PICKLE}), "not a torch.save archive"),
        (archive({**SOUND, "archive/byteorder": b"big"}), "another byte order"),
        (saved(torch.ones(2, 3))[:-1], "not a zip archive"),
    ],
)
def test_anything_but_one_plain_tensor_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(PtError, match=message):
        decode(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_lying_zip_fields_are_refused(order: str) -> None:
    data = bytearray(saved(torch.ones(2, 3)))
    for position in range(0, len(data) - 4):
        if data[position : position + 2] == b"PK":
            for offset in range(4, 46, 4):
                spoilt = bytearray(data)
                spoilt[position + offset : position + offset + 4] = struct.pack(f"{order}I", 0xFFFFFFF0)
                try:
                    assert torch.equal(decode(bytes(spoilt)), torch.ones(2, 3))
                except PtError:
                    continue


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    for tensor in (torch.ones(2, 3), torch.zeros(()), torch.empty(0, 4), torch.ones(3, dtype=torch.bfloat16)):
        assert torch.equal(decode(saved(tensor)), tensor)
    wide = torch.randn(70_000)
    assert torch.equal(decode(saved(wide)), wide)


def test_no_pickle_runs_whoever_reads(hostile: Path, sound: dict[str, Path], tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bomb = saved(marker(scratch))
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        torch.load(io.BytesIO(bomb), weights_only=True)
    for path in [*hostile.rglob("*.pt"), *hostile.rglob("*.safetensors")]:
        path.unlink()
        path.write_bytes(bomb)
    document = json.loads((hostile / "step_0/step.json").read_text())
    for each in document["records"]:
        if "file" in each:
            each["file_bytes"] = len(bomb)
    (hostile / "step_0/step.json").write_text(json.dumps(document))
    said = read_all(hostile)
    run_commands(hostile, sound["pt"], scratch)
    assert len(said) >= 3
    assert not (scratch / "ran").exists()


@pytest.fixture
def sharded(sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound["safetensors"], tmp_path / "runs" / "run"))


def shard_of(run: Path) -> Path:
    return next(run.rglob("*.safetensors"))


def lie_about_length(run: Path) -> None:
    data = shard_of(run).read_bytes()
    shard_of(run).write_bytes((100 << 20).to_bytes(8, "little") + data[8:])


def change_header(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        data = shard_of(run).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        shard_of(run).write_bytes(
            data[:8]
            + json.dumps(header, separators=(",", ":")).encode().ljust(length)[:length]
            + data[8 + length :]
        )

    return apply


def same_place(document: Any) -> None:
    """Two tensors of one size claim the same bytes."""
    first, second = [each for each in document["records"] if "alias_of" not in each and each["bytes"] == 24][
        :2
    ]
    second.update(offsets=first["offsets"], hash=first["hash"])


def false_alias(document: Any) -> None:
    other = next(each for each in document["records"] if each["hash"] != record(document)["hash"])
    record(document)["alias_of"] = other["name"]


def placed(**changes: Any) -> Callable[[Path], object]:
    return edit("step_0/step.json", lambda document: record(document).update(changes))


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a header of 100 MB in a small shard": (lie_about_length, "header would have 104857600 bytes"),
    "a header that is no JSON": (
        lambda run: shard_of(run).write_bytes(shard_of(run).read_bytes().replace(b'{"__', b"{{__", 1)),
        "header: damaged, not JSON",
    ),
    "a header that is deep": (
        lambda run: shard_of(run).write_bytes(
            (16_000_000).to_bytes(8, "little") + b"[" * 16_000_000 + shard_of(run).read_bytes()
        ),
        "holds more than|nested too deep|another size",
    ),
    "a header with other offsets": (
        change_header(lambda header: header[TENSOR].update(data_offsets=[0, 0])),
        f"its header places {TENSOR} elsewhere",
    ),
    "a header without a tensor": (change_header(lambda header: header.pop(TENSOR)), "elsewhere than step"),
    "overlapping tensors": (edit("step_0/step.json", same_place), "claim the same bytes"),
    "an alias that is none": (edit("step_0/step.json", false_alias), "is no alias of"),
    "offsets beyond the end": (
        placed(offsets=[1 << 40, (1 << 40) + 24]),
        "ends too early",
    ),
    "offsets into the header": (
        placed(offsets=[0, 24]),
        "step.json says|elsewhere",
    ),
    "huge tensor": (
        placed(shape=[1 << 38], offsets=[0, 1 << 40], bytes=1 << 40),
        "ends too early",
    ),
    "shard outside": (
        placed(shard="../../outside/secret"),
        "not a valid name",
    ),
    "shard is a pipe": (
        lambda run: in_place_of(str(shard_of(run).relative_to(run)), os.mkfifo)(run),
        "missing",
    ),
    "dtype is a function": (placed(dtype="load"), "damaged record"),
    "dtype cannot be shown": (placed(dtype="bits8"), "are not those"),
}


@pytest.mark.parametrize("attack", SHARDS)
def test_a_hostile_shard_is_refused(
    sharded: Path, sound: dict[str, Path], attack: str, tmp_path: Path
) -> None:
    spoil, message = SHARDS[attack]
    spoil(sharded)
    before = snapshot(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    said = read_all(sharded)
    said += [text for _, text in run_commands(sharded, sound["pt"], scratch, html=False).values()]
    assert re.search(message, "\n".join(said)), said
    assert snapshot(tmp_path) == before


def test_a_pipe_among_the_tensors_does_not_stop_a_reader(sound: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(sound["pt"], tmp_path / "run"))
    in_place_of(FILE, os.mkfifo)(run)
    opened = tlcore.open_run(run)
    assert "not a regular file" in str(attempt(lambda: opened.tensor(TENSOR)))
    with pytest.raises(VerifyError, match=re.escape(FILE)):
        opened.verify()
    if os.geteuid() == 0:
        in_place_of(FILE, lambda path: os.mknod(path, 0o20600, os.makedev(1, 5)))(run)
        assert "not a regular file" in str(attempt(lambda: tlcore.open_run(run).tensor(TENSOR)))
