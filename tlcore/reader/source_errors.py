"""What a source raises, which may be anything, as an error of the reader's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import BackendError, MissingError, ReadError


def tell(error: Exception, url: str, run: Mapping[str, Any]) -> NoReturn:
    """Raise what came out of a source as a ReadError (MissingError where a file is missing)."""
    if isinstance(error, ReadError):
        raise error
    if isinstance(error, FileNotFoundError):
        raise MissingError(f"{url}: {error}") from error
    if isinstance(error, (BackendError, OSError)):
        raise ReadError(str(error)) from error
    if isinstance(error, MemoryError):
        raise ReadError(f"{url}: larger than this machine's memory") from None
    text = f"the reader of the backend {run.get('backend')!r} failed ({type(error).__name__}: {error})"
    raise ReadError(f"{url}: {text}") from error
