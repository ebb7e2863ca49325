"""The safetensors backend, whose rank 1 commits no step while a file lies there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tlcore import Backend
from tlcore_backends.safetensors.sink import SafetensorsSink
from tlcore_backends.safetensors.versions import open_source

# The file, by an environment variable of every process of the engine.
VARIABLE = "TLCORE_TEST_LATE"
NAME = f"{__name__}:BACKEND"


class LateSink(SafetensorsSink):
    """Holds back what rank 1 commits."""

    def commit_step(self, step: Any) -> None:
        """Wait until the file is gone."""
        deadline = time.monotonic() + 300
        while self._rank == 1 and Path(os.environ[VARIABLE]).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        super().commit_step(step)


BACKEND = Backend(sink=LateSink, source=open_source)
