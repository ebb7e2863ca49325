"""From a run's path or URL to the store that keeps its bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from tlcore.protocols import Store

from .local import LocalStore

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_LOCAL_SCHEMES = ("file", "local")


DEADLINE_S = 30.0
ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """How long one remote request may take, and how often it is tried."""

    deadline_s: float = DEADLINE_S
    attempts: int = ATTEMPTS


def open_store(
    place: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    fsync: bool = False,
    limits: Limits | None = None,
) -> Store:
    """The store for a local path, a ``file://`` URL or the URL of any other fsspec protocol.

    ``storage_options`` go to the fsspec filesystem and ``limits`` hold for it; ``fsync`` matters on the
    local disk only. Raises BackendError for an unknown protocol, a missing package, or unusable options.
    """
    text = os.fspath(place)
    if not _URL.match(text):
        return LocalStore(text, fsync)
    parts = urlsplit(text)
    if parts.scheme.lower() in _LOCAL_SCHEMES and not parts.netloc:
        return LocalStore(unquote(parts.path), fsync)
    # Loaded only when needed: most runs go to the local disk.
    from .remote import FsspecStore

    limits = limits or Limits()
    return FsspecStore(text, storage_options, limits.deadline_s, limits.attempts)
