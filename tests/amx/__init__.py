"""AMX for the processes that tests start: the directory that they find `sitecustomize` in."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = str(Path(__file__).parent)


def with_amx(python_path: str | None) -> str:
    """A value of PYTHONPATH under which every Python process asks for AMX at its start."""
    others = [part for part in (python_path or "").split(os.pathsep) if part and part != DIRECTORY]
    return os.pathsep.join([DIRECTORY, *others])
