"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer, and what it keeps over many steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deep import DEEP
from tlcore.hotpath import build_hook

FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# All that touches memory; what asks how tlcore was installed is no matter of these.
CHECKED = [
    "test_bytes.py",
    "test_spans.py",
    "test_beneath.py",
    "test_whole_steps.py",
    "test_rows.py",
    "test_walking.py",
    "test_strides.py",
    "test_fingerprint.py",
    "test_looking.py",
    "test_listening.py",
    "test_using.py",
]


def _runtime(library: str) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return ""
    asked = [compiler, f"-print-file-name={library}"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    return path if os.path.isabs(path) else ""


@pytest.mark.slow
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    # torch throws exceptions, which libasan passes on to the C++ library only where that is loaded already.
    runtime = [_runtime("libasan.so"), _runtime("libstdc++.so.6")]
    if not all(runtime):
        pytest.skip("this compiler has no libasan")
    extension = build_hook.build(tmp_path / "_native.so", FLAGS)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        # Python itself keeps what it allocates; torch's own memory is not looked at.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    # A short form every time: Python is several times slower like this.
    chosen = [] if DEEP else ["-k", "not both_halves and not signal"]
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "tests.hotpath.sanitized", str(extension), *chosen]
    done = subprocess.run(
        [*command, *(str(folder / name) for name in CHECKED)],
        cwd=folder.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    shown = done.stdout[-4000:] + done.stderr[:4000]
    assert done.returncode == 0, shown
    assert " passed" in done.stdout and "skipped" not in done.stdout, shown
