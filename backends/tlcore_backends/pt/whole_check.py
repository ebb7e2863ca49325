"""Checking all files of many steps in few calls: which steps are proven sound.

What is wrong is not told here: a step that is not proven is looked at file by file, by those who then say it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import cached_property, partial
from typing import NamedTuple

from tlcore.errors import ReadError
from tlcore.hotpath.beneath import read_texts
from tlcore.hotpath.payloads import hash_payloads
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.run_files import MOST_VALUES
from tlcore.protocols import AlikeSteps, WholeCheck
from tlcore.record import Json

from .alike import EARLY_BYTES, UNUSUAL, Leader, Part, StepText, cut, together
from .frame_table import FrameTable

# Of the structures of one step that are read together.
LARGEST_TEXTS = 64 << 20
# Steps that are checked together, and kinds among them; each kind's first one is looked at as any step is.
_STEPS = 64
_KINDS = 8


class Files(NamedTuple):
    """A rank's files below ``directory``: ``structures`` gives the names of a step's structures.

    ``parsed`` is told the document of each step that is the first of its kind.
    """

    directory: str
    rank: int
    structures: Callable[[int], Collection[str]]
    parsed: Callable[[int, Json], None]


def check_steps(
    files: Files, texts: Iterable[tuple[int, bytes]], pool: Executor, threads: int
) -> Iterator[WholeCheck]:
    """Checks of a rank's steps, which are under way in ``pool`` of so many threads; some may be left out.

    ``texts`` are each step's ``step.json``, which nobody has looked at yet.
    """
    window = _Window(files, pool, threads)
    for step, text in texts:
        window.add(step, text)
        if window.count == _STEPS:
            yield window.check()
            window = _Window(files, pool, threads)
    if window.count:
        yield window.check()


class _Kind:
    """Steps that are alike; the first of them is looked at as any step is."""

    def __init__(self, leader: Leader, threads: int) -> None:
        self.leader = leader
        self._threads = threads
        self.steps: list[int] = []
        self.rests: list[Json] = []

    @cached_property
    def parts(self) -> Sequence[Part]:
        """The files of one of them, in parts; none where there are sizes that no file has."""
        with suppress(*UNUSUAL):
            return self.leader.parts(self._threads)
        return []


class _Window:
    """A few steps."""

    def __init__(self, files: Files, pool: Executor, threads: int) -> None:
        self._files, self._suffix, self._pool, self._threads = files, rank_suffix(files.rank), pool, threads
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
        if kind is not None:
            self._follow(kind, step, parts, directory)
        elif len(self._kinds) < _KINDS:
            try:
                kind = self._kinds[parts.kind] = self._lead(step, parts, directory)
            except UNUSUAL:
                return
            # Of a longer one nobody has counted the values.
            if len(text) <= MOST_VALUES:
                self._files.parsed(step, {**parts.rest, "records": kind.leader.records})

    def _lead(self, step: int, parts: StepText, directory: str) -> _Kind:
        """A kind whose first step this is. Raises one of `UNUSUAL`."""
        leader = Leader(parts, directory)
        first, *others = leader.pieces()
        leader.take(first)
        begun = len(leader.files) if others and leader.costs[-1] >= EARLY_BYTES else 0
        if begun:
            # Reading need not wait until all of a large step's records are objects.
            self._begin_part(step, leader, directory, parts.hashes, leader.part(0, begun))
        for piece in others:
            leader.take(piece)
        leader.finish()
        kind, left = _Kind(leader, self._threads), leader.parts(self._threads, begun)
        if not begun:
            kind.parts = left
        for part in left:
            self._begin_part(step, leader, directory, parts.hashes, part)
        kind.steps.append(step)
        kind.rests.append(parts.rest)
        return kind

    def _follow(self, kind: _Kind, step: int, parts: StepText, directory: str) -> None:
        leader = kind.leader
        if parts.rest.get("calls") != leader.calls or not kind.parts:
            return
        if len(kind.steps) == 1:
            first = f"{step_dir(kind.steps[0])}/"
            # Also those of calls without tensors.
            names = self._files.structures(kind.steps[0])
            leader.structures = sorted(name.removesuffix(".json") for name in names)
            leader.learn(self._texts(leader, first), first)
        self._begin(step, partial(self._texts_are_alike, leader, directory))
        kind.steps.append(step)
        kind.rests.append(parts.rest)
        for part in kind.parts:
            self._begin_part(step, leader, directory, parts.hashes, part)

    def _begin_part(
        self, step: int, leader: Leader, directory: str, hashes: Sequence[str], part: Part
    ) -> None:
        begin, end, table = part
        names = [directory + file for file in leader.files[begin:end]]
        self._begin(step, partial(_is_sound, self._files.directory, names, table, hashes[begin:end]))

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
        return read_texts(self._files.directory, leader.texts_of(directory, self._suffix), LARGEST_TEXTS)

    def _texts_are_alike(self, leader: Leader, directory: str) -> bool:
        return bool(leader.texts) and together(self._texts(leader, directory), directory) == leader.texts


def _is_sound(directory: str, names: Sequence[str], table: FrameTable, hashes: Sequence[str]) -> bool:
    """Whether each file is what `PtSink` writes around a payload that has the hash that its record states."""
    try:
        kept = bytearray(table.nbytes)
        first, digests = hash_payloads(directory, names, table.spans, kept)
    except (TypeError, ValueError, OSError, MemoryError, ReadError):
        return False
    return -1 not in first and "".join(hashes) == digests.hex() and table.is_around(kept, first)
