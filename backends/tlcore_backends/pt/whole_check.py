"""Checking all files of many steps in few calls: which steps are proven sound.

What is wrong is not told here: a step that is not proven is looked at file by file, by those who then say it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from tlcore.errors import ReadError
from tlcore.hotpath.beneath import read_texts
from tlcore.hotpath.payloads import hash_payloads
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.protocols import AlikeSteps, WholeCheck
from tlcore.record import Json

from .alike import Leader, cut, together
from .encode import Frame

# What one call reads, and of how many files, so that several threads have work.
_GROUP_BYTES = 32 << 20
_GROUP_FILES = 512
# Of the structures of one step that are read together.
LARGEST_TEXTS = 64 << 20
# Steps that are checked together, and kinds among them; each kind's first one is looked at as any step is.
_STEPS = 64
_KINDS = 8


def check_steps(
    directory: str,
    rank: int,
    texts: Iterable[tuple[int, bytes]],
    structures: Callable[[int], Collection[str]],
    pool: Executor,
) -> Iterator[WholeCheck]:
    """Checks of a rank's steps, which are under way in ``pool``; some steps may be left out.

    ``texts`` are each step's ``step.json``, which nobody has looked at yet. ``structures`` gives the names of
    a step's structures.
    """
    window = _Window(directory, rank, structures, pool)
    for step, text in texts:
        window.add(step, text)
        if window.count == _STEPS:
            yield window.check()
            window = _Window(directory, rank, structures, pool)
    if window.count:
        yield window.check()


class _Kind(NamedTuple):
    leader: Leader
    steps: list[int]
    rests: list[Json]


class _Window:
    """A few steps."""

    def __init__(
        self, directory: str, rank: int, structures: Callable[[int], Collection[str]], pool: Executor
    ) -> None:
        self._directory, self._suffix, self._pool = directory, rank_suffix(rank), pool
        self._structures = structures
        self._kinds: dict[bytes, _Kind] = {}
        self._parts: list[tuple[int, Future[bool]]] = []
        self.count = 0

    def add(self, step: int, text: bytes) -> None:
        """Begin to check a step, unless its documents are of another form than a capture writes."""
        self.count += 1
        directory = f"{step_dir(step)}/"
        parts = cut(text, directory.encode())
        if parts is None:
            return
        kind = self._kinds.get(parts.kind)
        if kind is None and len(self._kinds) < _KINDS:
            try:
                kind = self._kinds[parts.kind] = _Kind(Leader(parts, directory), [], [])
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError):
                return
        if kind is None or parts.rest.get("calls") != kind.leader.calls:
            return
        if kind.steps:
            if len(kind.steps) == 1:
                first = f"{step_dir(kind.steps[0])}/"
                # Also those of calls without tensors.
                names = self._structures(kind.steps[0])
                kind.leader.structures = sorted(name.removesuffix(".json") for name in names)
                kind.leader.learn(self._texts(kind.leader, first), first)
            self._begin(step, partial(self._texts_are_alike, kind.leader, directory))
        kind.steps.append(step)
        kind.rests.append(parts.rest)
        for group in _groups(kind.leader, directory, parts.hashes):
            self._begin(step, partial(_is_sound, self._directory, group))

    def check(self) -> WholeCheck:
        """The check of all steps that were added."""
        alike = [AlikeSteps(kind.steps, len(kind.leader.files), kind.rests) for kind in self._kinds.values()]
        return WholeCheck(alike, self._unsound)

    def _begin(self, step: int, check: Callable[[], bool]) -> None:
        self._parts.append((step, self._pool.submit(check)))

    def _unsound(self) -> Collection[int]:
        return {step for step, part in self._parts if not part.result()}

    def _texts(self, leader: Leader, directory: str) -> Sequence[bytes | None]:
        """The bytes of a step's call order and structures."""
        return read_texts(self._directory, leader.texts_of(directory, self._suffix), LARGEST_TEXTS)

    def _texts_are_alike(self, leader: Leader, directory: str) -> bool:
        return bool(leader.texts) and together(self._texts(leader, directory), directory) == leader.texts


class _Group(NamedTuple):
    """Some of a step's files: their names, the frame of each, and the hashes that their records state."""

    names: Sequence[str]
    frames: Sequence[Frame]
    hashes: Sequence[str]


def _groups(leader: Leader, directory: str, hashes: Sequence[str]) -> Iterator[_Group]:
    edges, size = [0], 0
    for index, frame in enumerate(leader.frames):
        if index > edges[-1] and (size + frame.size > _GROUP_BYTES or index - edges[-1] >= _GROUP_FILES):
            edges.append(index)
            size = 0
        size += frame.size
    for begin, end in pairwise([*edges, len(leader.frames)]):
        names = [directory + file for file in leader.files[begin:end]]
        yield _Group(names, leader.frames[begin:end], hashes[begin:end])


def _is_sound(directory: str, group: _Group) -> bool:
    """Whether each file is what `PtSink` writes around a payload that has the hash that its record states."""
    spans, places, at = list[int](), list[int](), 0
    for frame in group.frames:
        begin = len(frame.head)
        spans += (frame.size, begin, begin + frame.payload_bytes)
        places.append(at)
        at += frame.size - frame.payload_bytes
    kept = bytearray(at)
    try:
        packed = struct.pack(f"={len(spans)}q", *spans)
        first, digests = hash_payloads(directory, group.names, packed, kept)
    except (TypeError, ValueError, OSError, MemoryError, ReadError, struct.error):
        return False
    if -1 in first or "".join(group.hashes) != digests.hex():
        return False
    seen: set[tuple[int, int]] = set()
    for frame, index in zip(group.frames, first, strict=True):
        known = index, id(frame)
        if known not in seen:
            seen.add(known)
            if not frame.stands_in(kept, places[index]):
                return False
    return True
