"""The fast tests of capture, sinks and readers once more, where the extension is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deep import scaled

ROOT = Path(__file__).parents[2]
CHECKED = [
    "tests/engine/hooks",
    "tests/engine/staging",
    "tests/engine/test_objects.py",
    "tests/engine/test_root.py",
    "tests/engine/test_session.py",
    "tests/backends/pt",
    "tests/backends/safetensors",
    "tests/reader",
    "tests/runs/test_alike_steps.py",
    "tests/runs/test_convert.py",
    "tests/hotpath",
]
# What these look at has no half of C: compiled functions, and the code of classes.
THE_SAME = ["tests/engine/hooks/test_compiled_functions.py", "tests/engine/hooks/test_axis_order.py"]


@pytest.mark.slow
def test_everything_is_the_same_without_the_extension() -> None:
    environment = {**os.environ, "TLCORE_NO_EXTENSIONS": "1"}
    # This process may be a worker of pytest's, which the other one is not.
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *CHECKED]
    command += [f"--ignore={each}" for each in THE_SAME]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(900, 7000),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
