"""Dumps of other tools: recognised by what they hold, and opened as runs in place."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BackendError, MissingError, ReadError
from ..locations import is_url, redact_url
from ..record import LAYOUT_VERSION, Json
from ..registry import recognise
from ..storage import Store
from .documents import FOREIGN
from .opening import open_file

log = logging.getLogger("tlcore")
_NO_ID = re.compile(r"[^A-Za-z0-9_\-=+@.]+")
_IS_FILE = re.compile(r"\.[A-Za-z][A-Za-z0-9]*\Z")


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file of this machine, which is no run but may be another tool's dump."""
    text = os.fspath(path)
    return not is_url(text) and Path(text).expanduser().is_file()


def open_foreign(
    path: str | os.PathLike[str], store: Store | None, options: Mapping[str, Any] | None
) -> tuple[tuple[Store, Json] | None, list[str]]:
    """The store and the run document of a dump, and what is missing where one is nearly there.

    ``store`` is that of ``path``, None for a file. A URL may be that of a file, too.
    """
    text = os.fspath(path)
    if store is None:
        store = open_file(Path(text).expanduser())
    found, near = _recognised(store)
    if found is None and is_url(text) and _IS_FILE.search(text.rpartition("/")[2]):
        try:
            found, more = _recognised(open_file(text, options))
        except (BackendError, MissingError):
            more = []
        near += more
    if found is not None and near:
        # Whoever took it for that tool's dump should not miss that it is read as another.
        kind = found[1]["backend"]
        shown = "plain tensors" if kind == "plain" else f"a dump of {kind}"
        log.warning("%s is read as %s, but nearly is another: %s", redact_url(text), shown, "; ".join(near))
    return found, near


def not_recognised(path: str | os.PathLike[str], near: list[str]) -> ReadError:
    """The error for a file that is no dump of any tool that is known."""
    shown = "".join(f"\n  {each}" for each in near)
    text = "is a file; give the run's directory, or a dump of another tool"
    return ReadError(f"{redact_url(os.fspath(path))}: {text}{shown}")


def _recognised(store: Store) -> tuple[tuple[Store, Json] | None, list[str]]:
    found, near, others, passed_over = recognise(store)
    if found is not None and others:
        text = "%s is read as a dump of %s, and is also one of %s, which is not read: keep them apart"
        log.warning(text, redact_url(store.url), found["backend"], ", ".join(others))
    if found is None:
        return None, near
    if passed_over:
        text = "%s: %d files are not read as a part of the dump of %s, such as %s"
        log.warning(text, redact_url(store.url), len(passed_over), found["backend"], min(passed_over))
    name = _NO_ID.sub("_", store.url.rstrip("/").rpartition("/")[2]).strip("._") or "dump"
    document = {
        "layout": LAYOUT_VERSION,
        "run_id": name[:100],
        "created": "",
        "config": {},
        "state": "complete",
        FOREIGN: True,
        **found,
    }
    return (store, document), near
