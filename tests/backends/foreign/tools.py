"""The tools whose dumps are read: each installed once, in the user's cache, and run in its own process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.models import CACHE

_MADE = "made"


def installed(name: str, *requirements: str) -> Path:
    """A directory with these packages and nothing that they need: what `written` adds to the path."""
    home = CACHE / "foreign" / name
    if not (home / _MADE).exists():
        shutil.rmtree(home, ignore_errors=True)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
        _run(*pip, "--target", str(home), *requirements)
        (home / _MADE).touch()
    return home


def write(package: Path, script: str, *arguments: str) -> str:
    """Run a script that has the packages of a directory; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    return _run(sys.executable, "-c", script, *arguments, environment=environment)


def _run(*command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
