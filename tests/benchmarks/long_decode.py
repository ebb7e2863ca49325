"""A whole model's decode to the local disk, in segments: its size, and its calls to the file system."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import tlcore
from tests.adapters.vllm.helpers import ENVIRONMENT, REPOSITORY

from .long import distinct_bytes, overhead
from .rows import Row, Scale, at_most
from .subprocesses import report

_CALL = re.compile(r"\d+\s+(\w+)\(")


def table(scale: Scale) -> list[Row]:
    """Stored bytes over payload, and system calls a step where they can be traced."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        # Closed by their size: a busy machine, whose steps take a second, closes one for each step by time.
        keys = json.dumps({"output_dir": name, "backend": {"name": "safetensors", "commit_s": 1000}})
        report("long_process", "decode", scale.name, keys)
        (url,) = Path(name).iterdir()
        stored = sum(path.stat().st_size for path in url.rglob("*") if path.is_file())
        segments = len(list(url.glob("segments/*_steps_*")))
        what = f"a whole model's decode in {segments} segments"
        rows = [overhead(what, stored, distinct_bytes(tlcore.open_run(url)), 1.02)]
    return rows + (_calls(scale) if shutil.which("strace") is not None else [])


def _calls(scale: Scale) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        # Tracing makes steps many times slower, and must not close more segments for that.
        keys = json.dumps({"output_dir": name, "backend": {"name": "safetensors", "commit_s": 1000}})
        calls = _traced_calls(name, ["decode", scale.name, keys])
        (url,) = Path(name).iterdir()
        files = sum(1 for path in url.rglob("*") if path.is_file())
    writes = calls["write"] + calls["writev"]
    what = f"a step, {scale.decode_steps} decode steps, all modules"
    others = (calls.total() - writes) / scale.decode_steps
    return [
        Row(
            f"calls to the file system {what}",
            calls.total() / scale.decode_steps,
            at_most(4),
            "",
            f"{calls.total()} calls, {writes} of them writes; {files} files",
        ),
        Row(f"of these, other than writes, {what}", others, None),
    ]


def _traced_calls(directory: str, command: list[str]) -> Counter[str]:
    """The system calls of a capture that name the run's directory, or a file that lies in it, by name."""
    with tempfile.NamedTemporaryFile("r", prefix="tlcore-bench-") as log:
        program = [sys.executable, "-m", f"{__package__}.long_process", *command]
        tracing = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", "trace=%file,%desc", "-o", log.name]
        done = subprocess.run(
            [*tracing, *program],
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the traced capture failed:\n{done.stderr[-4000:]}")
        # Each line begins with the process's id; the program's own arguments name the directory, too.
        named = (_CALL.match(line) for line in log if directory in line and "resumed>" not in line)
        return Counter(found[1] for found in named if found is not None and found[1] != "execve")
