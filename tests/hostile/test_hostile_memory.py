"""Files that would fill the memory of whoever reads them: refused within a bound, in a process of its own."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.deep import scaled
from tests.hostile.files import TENSOR, edit, in_place_of, in_run, record, sound

__all__ = ["sound"]

MIB = 1 << 20
TB = 1 << 40
MANY = scaled(60, 200)


def sparse(size: int, begin: bytes = b"") -> Callable[[Path], None]:
    """A file that takes no room on the disk."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write(begin)
            file.truncate(size)

    return make


def _filled(path: Path, piece: bytes, count: int, begin: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(count):
            file.write(piece)


def bomb(path: Path) -> None:
    """A ``.pt`` file of 512 MB of zeros in half a MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        made.writestr("archive/data.pkl", b"\x80\x02.")
        with made.open("archive/data/0", "w") as entry:
            for _ in range(512):
                entry.write(bytes(MIB))
    path.write_bytes(buffer.getvalue())


def huge_shapes(document: Any) -> None:
    for each in document["records"]:
        each.update(shape=[1 << 38], bytes=TB, offsets=[0, TB], file_bytes=TB)


def many_records(like: Any) -> list[Any]:
    return [{**like, "name": f"step_0/a/{number}"} for number in range(scaled(200, 5000))]


def long_header(run: Path) -> None:
    shard = next(run.rglob("*.safetensors"))
    data, length = shard.read_bytes(), 100 * MIB
    shard.unlink()
    _filled(shard, b'"a":[[],' * (MIB // 8), 100, length.to_bytes(8, "little"))
    with shard.open("ab") as file:
        file.write(data)


STEP = '{"layout": 1, "ledger": {}, "calls": [], "records": ['
BOMBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "run file of 1 TB": ("pt", in_place_of("run.json", sparse(TB))),
    "step file of 1 TB": ("pt", in_place_of("step_0/step.json", sparse(TB, STEP.encode()))),
    "packed step of 1 TB": ("safetensors", in_place_of("step_0/step.json", sparse(TB, STEP.encode()))),
    "tensor file of 1 TB": ("pt", in_place_of(f"{TENSOR}.pt", sparse(TB))),
    "structure of 1 TB": ("pt", in_place_of("step_0/linear/inputs.json", sparse(TB, b'{"type": "'))),
    "call list of 1 TB": ("pt", in_place_of("step_0/module_calls.txt", sparse(TB))),
    "many MB of brackets": (
        "pt",
        in_place_of("step_0/step.json", lambda path: _filled(path, b"[]," * (MIB // 3), MANY, STEP.encode())),
    ),
    "many MB of depth": ("pt", in_place_of("step_0/step.json", lambda path: _filled(path, b"[" * MIB, MANY))),
    "many MB in one text": (
        "pt",
        in_place_of("run.json", partial(_filled, piece=b"a" * MIB, count=MANY, begin=b'{"')),
    ),
    "a billion ranks": ("pt", in_run(world_size=10**9)),
    "a million ranks": ("safetensors", in_run(world_size=10**6)),
    "zip bomb": ("pt", in_place_of(f"{TENSOR}.pt", bomb)),
    "huge shapes": ("safetensors", edit("step_0/step.json", huge_shapes)),
    "huge shapes of files": ("pt", edit("step_0/step.json", huge_shapes)),
    "header of 100 MB": ("safetensors", long_header),
    "many records at one place": (
        "safetensors",
        edit("step_0/step.json", lambda document: document.update(records=many_records(record(document)))),
    ),
}

READER = """
import json, os, resource, sys
from pathlib import Path
from tests.reading import read_all, run_commands

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

sound, scratch, *runs = map(Path, sys.argv[1:])
read_all(sound)
run_commands(sound, sound, scratch / "sound", html=False)
size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30),) * 2)
for run in runs:
    before = peak()
    said = read_all(run)
    printed = run_commands(run, sound, scratch / run.parent.name, html=False)
    print(json.dumps({"run": run.parent.name, "grown": peak() - before, "said": [text[:300] for text in said],
                      "printed": [[status, text[:300]] for status, text in printed.values()]}))
"""


@pytest.mark.slow
def test_memory_stays_bounded_whatever_a_file_claims(sound: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for number, (backend, spoil) in enumerate(BOMBS.values()):
        run = Path(shutil.copytree(sound[backend], tmp_path / f"{number}" / "run"))
        spoil(run)
        runs.append(str(run))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", READER, str(sound["pt"]), str(scratch), *runs],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(BOMBS)
    for name, each in zip(BOMBS, found, strict=True):
        assert each["grown"] < (100 if name == "zip bomb" else 1000) * MIB, (name, each)
        assert each["said"] or any(status for status, _ in each["printed"]), name


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_the_limit_itself_works() -> None:
    program = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2); bytearray(2 << 30)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert "MemoryError" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] in (resource.RLIM_INFINITY, -1)


TWICE = """
import os, resource, sys
from pathlib import Path
import tlcore
from tlcore.errors import ReadError

step = tlcore.open_run(sys.argv[1]).step(0)
name = next(name for name in step.names if "large" in name and "outputs" in name)
step.tensor(next(name for name in step.names if "small" in name))
size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (96 << 20), -1))
try:
    step.tensor(name)
except ReadError as error:
    print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_a_tensor_for_whose_copy_there_is_no_room_is_refused_with_its_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"small": nn.ReLU(), "large": nn.ReLU()})
    with tlcore.capture(model, output_dir=str(tmp_path), backend="safetensors") as captured, captured.step():
        model["small"](torch.randn(3))
        model["large"](torch.randn(16 << 20))
    done = subprocess.run(
        [sys.executable, "-c", TWICE, captured.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "large/outputs_cpu" in done.stdout, done.stderr
    assert "larger than this machine's memory" in done.stdout
