"""Checking all files of many steps in few calls: which steps are proven sound.

What is wrong is not told here: a step that is not proven is looked at file by file, by those who then say it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import NamedTuple

from tlcore.errors import ReadError
from tlcore.hotpath.beneath import read_texts
from tlcore.hotpath.payloads import hash_payloads
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.protocols import AlikeSteps, WholeCheck
from tlcore.record import Json

from .alike import UNUSUAL, Leader, Part, cut, together
from .frame_table import FrameTable

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
    threads: int,
) -> Iterator[WholeCheck]:
    """Checks of a rank's steps, which are under way in ``pool`` of so many threads; some may be left out.

    ``texts`` are each step's ``step.json``, which nobody has looked at yet. ``structures`` gives the names of
    a step's structures.
    """
    window = _Window(directory, rank, structures, pool, threads)
    for step, text in texts:
        window.add(step, text)
        if window.count == _STEPS:
            yield window.check()
            window = _Window(directory, rank, structures, pool, threads)
    if window.count:
        yield window.check()


class _Kind(NamedTuple):
    leader: Leader
    parts: Sequence[Part]
    steps: list[int]
    rests: list[Json]


class _Window:
    """A few steps."""

    def __init__(
        self,
        directory: str,
        rank: int,
        structures: Callable[[int], Collection[str]],
        pool: Executor,
        threads: int,
    ) -> None:
        self._directory, self._suffix, self._pool = directory, rank_suffix(rank), pool
        self._structures, self._threads = structures, threads
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
                leader = Leader(parts, directory)
                kind = _Kind(leader, leader.parts(self._threads), [], [])
            except UNUSUAL:
                return
            self._kinds[parts.kind] = kind
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
        for begin, end, table in kind.parts:
            names = [directory + file for file in kind.leader.files[begin:end]]
            self._begin(step, partial(_is_sound, self._directory, names, table, parts.hashes[begin:end]))

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


def _is_sound(directory: str, names: Sequence[str], table: FrameTable, hashes: Sequence[str]) -> bool:
    """Whether each file is what `PtSink` writes around a payload that has the hash that its record states."""
    try:
        kept = bytearray(table.nbytes)
        first, digests = hash_payloads(directory, names, table.spans, kept)
    except (TypeError, ValueError, OSError, MemoryError, ReadError):
        return False
    return -1 not in first and "".join(hashes) == digests.hex() and table.is_around(kept, first)
