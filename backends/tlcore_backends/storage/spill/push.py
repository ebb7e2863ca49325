"""Delivering what an ended process left in its ``spill_dir``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tlcore.errors import BackendError
from tlcore.locations import REDACTED, redact_url
from tlcore.record import writer_is_running
from tlcore.registry import open_store

from ..local import LocalStore, unfinished_files
from .delivery import deliver, is_marker, remove_empty_directories


@dataclass(frozen=True, slots=True)
class SpilledRun:
    """One run's directory in a ``spill_dir``: where its ``files`` belong, and who put them there.

    ``notes`` are the ranks' files that say so.
    """

    path: str
    url: str
    files: tuple[str, ...]
    bytes: int
    owner_alive: bool
    notes: tuple[str, ...]


def spilled_runs(directory: str) -> list[SpilledRun]:
    """What waits in a ``spill_dir``, or in the directory of one run in it; the oldest run first.

    Raises BackendError when there is no such directory, or a note in it is damaged.
    """
    if not os.path.isdir(directory):
        raise BackendError(f"{redact_url(directory)}: there is no such directory")
    children = [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
    places = [directory, *(child for child in children if os.path.isdir(child))]
    return [run for place in places if (run := _spilled_run(place)) is not None]


def destination(run: SpilledRun, to: str | None) -> str:
    """Where a run's files go: to its own place, or into the output_dir ``to``."""
    return f"{to.rstrip('/')}/{os.path.basename(os.path.abspath(run.path))}" if to else run.url


def push(
    run: SpilledRun,
    storage_options: Mapping[str, Any] | None = None,
    to: str | None = None,
    on_delivered: Callable[[str], None] = lambda name: None,
) -> None:
    """Deliver a run's files to where they belong, or into the output_dir ``to``, and remove them here.

    ``storage_options`` go to the URL's fsspec filesystem. What was delivered stays delivered when
    another file fails: a later push goes on there. Raises BackendError when the place cannot be written.
    """
    url = destination(run, to)
    if REDACTED in url:
        raise BackendError(f"{url}: its credentials were not kept; say where to deliver with --to")
    source = LocalStore(run.path)
    target = open_store(url, storage_options)

    def delivered(name: str) -> None:
        source.delete(name)
        on_delivered(name)

    try:
        deliver(source, target, run.files, delivered)
    except FileNotFoundError as error:
        raise BackendError(f"{redact_url(url)}: the original of a copy is missing there: {error}") from None
    finally:
        target.close()
    # Not those of ranks that began to spill meanwhile: their files are not among these.
    for name in run.notes:
        source.delete(name)
    if not run.owner_alive:
        for path in unfinished_files(run.path):
            os.unlink(path)
    remove_empty_directories(run.path)


def _spilled_run(path: str) -> SpilledRun | None:
    store = LocalStore(path)
    notes: dict[str, dict[str, Any]] = {}
    # Ranks that are alive may have delivered everything before it is looked at.
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(filter(is_marker, os.listdir(path))):
            with contextlib.suppress(FileNotFoundError):
                notes[name] = _note(store, name)
    if not notes:
        return None
    entries = [entry for entry in store.list() if not is_marker(entry.name)]
    return SpilledRun(
        path=path,
        url=next(iter(notes.values()))["url"],
        files=tuple(entry.name for entry in entries),
        bytes=sum(entry.size for entry in entries),
        owner_alive=any(map(writer_is_running, notes.values())),
        notes=tuple(notes),
    )


def _note(store: LocalStore, name: str) -> dict[str, Any]:
    try:
        note = json.loads(store.get(name))
    except (ValueError, RecursionError):
        note = None
    if not isinstance(note, dict) or not isinstance(note.get("url"), str):
        raise BackendError(f"{store.url}/{name}: damaged; it should say where the run belongs")
    return note
