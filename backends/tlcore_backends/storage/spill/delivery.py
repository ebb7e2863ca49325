"""From a directory of spilled blobs to the place they belong, never a step's end before the step."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial

from tlcore.layout.names import rank_suffix
from tlcore.layout.run_files import RUN_FILE
from tlcore.protocols import Entry, Store

from ..local import LocalStore
from ..uploads import Uploads

# A blob of this name holds the name of the one it is a copy of.
COPY = ".copy"
_STEP = re.compile(r"step_(\d+)/")
_SEGMENT = re.compile(r"segments/rank_\d+_(\d+)[_.]")
# What commits a step, and what a run begins and ends with.
STEP_END = re.compile(
    r"step_\d+/step(_rank_\d+)?\.json|segments/(rank_\d+_\d+_steps|catalogue_rank)_.+\.json"
)
_MARKER = re.compile(r"spill(_rank_[1-9]\d*)?\.json")
_WINDOW_BYTES = 64 << 20
_NO_STEP = 1 << 62


def marker_name(rank: int) -> str:
    """The file that says where a rank's spilled blobs belong."""
    return f"spill{rank_suffix(rank)}.json"


def is_marker(name: str) -> bool:
    """Whether a file of a spill directory is such a note, and no blob."""
    return _MARKER.fullmatch(name) is not None


def deliver(
    source: LocalStore, target: Store, names: Collection[str], on_delivered: Callable[[str], None]
) -> None:
    """Put the blobs ``names`` of ``source`` into ``target``, step by step, many at a time.

    A step's blobs go first, then copies, then the ``step.json`` that commits it, and ``run.json`` at the
    very end. ``on_delivered`` is called, in any thread, with the name of each one. Raises BackendError
    as ``target`` does; FileNotFoundError for a copy whose original is not in ``target``.
    """
    uploads = Uploads(target)

    def one(name: str) -> None:
        try:
            data = source.get(name)
        except FileNotFoundError:
            # Somebody else has delivered it.
            on_delivered(name)
            return
        if name.endswith(COPY):
            target.copy(data.decode(), name.removesuffix(COPY))
        else:
            target.put(name, [data])
        on_delivered(name)

    entries = [entry for entry in source.list() if entry.name in names]
    for name in set(names).difference(entry.name for entry in entries):
        on_delivered(name)
    try:
        for group in _groups(entries):
            for name in group:
                uploads.run(partial(one, name))
            uploads.wait()
    finally:
        uploads.close()


def remove_empty_directories(root: str) -> None:
    """Remove ``root`` and the directories below it that hold no file."""
    for directory, _, _ in os.walk(root, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            continue


def _groups(entries: list[Entry]) -> Iterator[list[str]]:
    """Names that may travel at the same time, in the order of the groups; the first has one name.

    While the place cannot be reached, that one is all that tries.
    """
    first = True
    for window in _windows(sorted(entries, key=lambda entry: _step_of(entry.name))):
        for turn in range(4):
            for names in _portions([entry for entry in window if _turn(entry.name) == turn]):
                if first:
                    yield names[:1]
                yield names[1:] if first else names
                first = False


def _portions(entries: list[Entry]) -> Iterator[list[str]]:
    """The names in lists of a bounded number of bytes, since each upload holds its blob in memory."""
    names: list[str] = []
    size = 0
    for entry in entries:
        if names and size + entry.size > _WINDOW_BYTES:
            yield names
            names, size = [], 0
        names.append(entry.name)
        size += entry.size
    if names:
        yield names


def _windows(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Whole steps together, until they are large; what belongs to no step comes last, by itself."""
    window: list[Entry] = []
    size = 0
    for step, group in itertools.groupby(entries, key=lambda entry: _step_of(entry.name)):
        if window and (size > _WINDOW_BYTES or step == _NO_STEP):
            yield window
            window, size = [], 0
        added = list(group)
        window += added
        size += sum(entry.size for entry in added)
    if window:
        yield window


def _step_of(name: str) -> int:
    # A run has steps' files or segments, which are delivered in the order of their numbers.
    step = _STEP.match(name) or _SEGMENT.match(name)
    return _NO_STEP if step is None else int(step[1])


def _turn(name: str) -> int:
    """Blobs, then copies, then what commits a step, and the run's own end after everything."""
    if name == RUN_FILE:
        return 3
    if STEP_END.fullmatch(name):
        return 2
    return 1 if name.endswith(COPY) else 0
