"""What commands share that run engines in processes of their own."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError, TlcoreError
from ..layout.jsontext import parse_json
from ..record import Json
from .arguments import local_path


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--timeout`` and ``--keep``."""
    add = parser.add_argument
    add("--timeout", type=float, default=900.0, help="seconds for each process (default: %(default)g)")
    add(
        "--keep",
        metavar="DIR",
        type=local_path,
        help="a new directory, for the captured runs and each process's log",
    )


@contextmanager
def process_directory(keep: str | None, command: str) -> Iterator[Path]:
    """The new directory ``keep``, else a temporary one. Raises TlcoreError where it cannot be made."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix=f"tlcore-{command}-") as directory:
            yield Path(directory)
        return
    try:
        Path(keep).mkdir(parents=True)
    except OSError as error:
        raise TlcoreError(f"{keep}: cannot be made ({error.strerror}); --keep takes a new one") from error
    yield Path(keep)


def engine_arguments(flag: str, text: str) -> Json:
    """The JSON object that a flag was given. Raises ConfigError."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ConfigError(flag, f"{text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(flag, f"{text!r} is no JSON object.")
    return found
