"""A whole model's decode to the local disk, in segments: its size, and its calls to the file system."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tlcore
from tests.adapters.vllm.helpers import ENVIRONMENT, REPOSITORY

from .long import distinct_bytes, overhead
from .rows import Row, Scale, at_most
from .subprocesses import report


def table(scale: Scale) -> list[Row]:
    """Stored bytes over payload, and system calls a step where they can be traced."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        keys = json.dumps({"output_dir": name, "backend": "safetensors"})
        command = ["decode", scale.name, keys]
        traced = shutil.which("strace") is not None
        if traced:
            calls = _traced_calls(name, command)
        else:
            report("long_process", *command)
        (url,) = Path(name).iterdir()
        stored = sum(path.stat().st_size for path in url.rglob("*") if path.is_file())
        rows = [overhead("a whole model's decode", stored, distinct_bytes(tlcore.open_run(url)), 1.02)]
        files = sum(1 for path in url.rglob("*") if path.is_file())
    if traced:
        per_step = calls / scale.decode_steps
        what = f"calls to the file system a step, {scale.decode_steps} decode steps, all modules"
        rows.append(Row(what, per_step, at_most(4), "", f"{calls} calls, {files} files"))
    return rows


def _traced_calls(directory: str, command: list[str]) -> int:
    """How many system calls of a capture name the run's directory, or a file that lies in it."""
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
        return sum(directory in line for line in log if "execve(" not in line and "resumed>" not in line)
