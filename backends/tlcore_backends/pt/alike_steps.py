"""Steps of a run that are like an earlier one, each of whose files are read in one call."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any

import numpy as np

from tlcore.alike import AlikeStep
from tlcore.errors import ReadError
from tlcore.hotpath.beneath import count_entries, read_texts
from tlcore.hotpath.gathering import gather_payloads
from tlcore.layout.hashes import HASH_BYTES
from tlcore.layout.names import rank_suffix, step_dir

from .alike import UNUSUAL, Leader, StepText, cut, text_files, together
from .frame_table import FrameTable
from .whole_check import LARGEST_TEXTS

# A run alternates between few kinds of steps; of each, its records are kept as a text.
_MOST_KINDS = 8
_THREADS = min(4, os.cpu_count() or 1)
Numbers = np.ndarray[Any, np.dtype[np.int64]]
# The call order and step.json.
_OWN_FILES = 2


def alike_steps(
    directory: str,
    rank: int,
    texts: Iterable[tuple[int, bytes]],
    structures: Callable[[int], Collection[str]],
) -> Iterator[AlikeStep | int]:
    """Each of a rank's steps below ``directory``, whose ``step.json`` are ``texts``, in order.

    ``structures`` gives the names of a step's structures.
    """
    with ThreadPoolExecutor(_THREADS, "tlcore-list") as pool:
        reader = _Reader(directory, rank, structures, pool)
        # While the tensors of one are read, the texts of the next one are.
        left, ahead = iter(texts), None
        while (now := ahead or next(left, None)) is not None:
            found = reader.look(*now)
            ahead = next(left, None)
            if found is not None and ahead is not None:
                reader.expect(ahead[0])
            yield found or now[0]


class _Part:
    """Some files of a kind's steps, and where in a step's memory the tensor of each goes."""

    def __init__(self, begin: int, end: int, table: FrameTable, spans: Numbers) -> None:
        self.begin, self.end, self._table, self._spans = begin, end, table, spans
        self._kept = bytearray(table.nbytes)

    def fill(self, directory: str, names: Sequence[str], hashes: bytes, memory: memoryview) -> bool:
        """Read a step's tensors to their places; whether all are sound, with what is around them."""
        hashes = hashes[HASH_BYTES * self.begin : HASH_BYTES * self.end]
        try:
            read, digests = gather_payloads(
                directory, names[self.begin : self.end], self._spans, self._kept, memory
            )
        except (TypeError, ValueError, OSError, MemoryError, ReadError):
            return False
        first = np.frombuffer(read, np.int64)
        # Of hard links what is around the payload was kept once; each must be what its own record says.
        return digests == hashes and not (first < 0).any() and self._table.is_around(self._kept, first)


class _Kind:
    """Steps that are alike, and where each of their tensors goes."""

    def __init__(self, step: int, leader: Leader, threads: int) -> None:
        """Raises ValueError where an alias is none of a tensor before it, else as `FrameTable`."""
        self.step, self.leader = step, leader
        # All of them, as the listing has them; and whether there is nothing in the step's directory beside.
        self.structures: list[str] = []
        self.has_no_others = False
        self.originals = leader.originals
        targets, self.nbytes = list[int](), 0
        for index, frame in enumerate(leader.frames):
            own = self.originals[index] == index
            targets.append(self.nbytes if own else -1)
            self.nbytes += frame.payload_bytes if own else 0
        goes = np.array(targets, np.int64)
        # Their memory is used again for each step.
        self.parts = [
            _Part(*part, np.column_stack((part.table.spans, goes[part.begin : part.end])))
            for part in leader.parts(threads)
        ]

    @cached_property
    def directories(self) -> list[str]:
        """The directories of the calls."""
        files = *self.leader.files, *self.structures
        return sorted({file.rpartition("/")[0] for file in files})

    @cached_property
    def entries(self) -> int:
        """How many names there are in a step's directory and in those of its calls."""
        own = len(set(self.leader.files)) + len(self.structures)
        return own + len(self.directories) + _OWN_FILES


class _Reader:
    def __init__(
        self, directory: str, rank: int, structures: Callable[[int], Collection[str]], pool: Executor
    ) -> None:
        self._directory, self._suffix, self._structures = directory, rank_suffix(rank), structures
        self._pool = pool
        self._kinds: OrderedDict[bytes, _Kind] = OrderedDict()
        self._expected: tuple[int, _Kind, Future[bool]] | None = None

    def look(self, step: int, text: bytes) -> AlikeStep | None:
        """A step that is like an earlier one; None for any other."""
        directory = f"{step_dir(step)}/"
        parts = cut(text, directory.encode())
        if parts is None:
            return None
        kind = self._kinds.get(parts.kind)
        if kind is None:
            self._learn(step, parts, directory)
            return None
        self._kinds.move_to_end(parts.kind)
        leader = kind.leader
        if parts.rest.get("calls") != leader.calls:
            return None
        if not kind.structures:
            self._learn_texts(kind)
        if not leader.texts or not self._has_expected_texts(kind, step, directory):
            return None
        hashes = bytes.fromhex("".join(parts.hashes))
        table = np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
        if not np.array_equal(table, table[kind.originals]):
            return None
        names = [directory + file for file in leader.files]

        def fill(memory: memoryview) -> bool:
            return self._fill(kind, names, hashes, memory)

        return AlikeStep(step, kind.step, parts.rest, hashes, kind.nbytes, fill)

    def expect(self, step: int) -> None:
        """Begin to read the texts of the next step, which mostly is of the same kind as the last."""
        kind = next(reversed(self._kinds.values()), None)
        if kind is not None and kind.has_no_others:
            check = self._pool.submit(self._has_texts_of, kind, step, f"{step_dir(step)}/")
            self._expected = step, kind, check

    def _has_expected_texts(self, kind: _Kind, step: int, directory: str) -> bool:
        expected, self._expected = self._expected, None
        if expected is not None and expected[:2] == (step, kind):
            return expected[2].result()
        return self._has_texts_of(kind, step, directory)

    def _learn(self, step: int, parts: StepText, directory: str) -> None:
        try:
            kind = _Kind(step, Leader.of(parts, directory), _THREADS)
        except UNUSUAL:
            return
        self._kinds[parts.kind] = kind
        if len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)

    def _learn_texts(self, kind: _Kind) -> None:
        """Remember all texts of the first step of a kind, where another's can be told to be alike."""
        directory = f"{step_dir(kind.step)}/"
        kind.structures = sorted(name.removesuffix(".json") for name in self._structures(kind.step))
        kind.leader.learn(self._texts(kind, directory), directory)
        kind.has_no_others = not self._suffix and self._count(kind, directory) == kind.entries

    def _has_texts_of(self, kind: _Kind, step: int, directory: str) -> bool:
        """Whether a step has the same texts, and no structure more."""
        if kind.has_no_others:
            # All files of the kind are looked at; so nothing else can be there where they are as many.
            return self._reads_as(kind, directory) and self._count(kind, directory) == kind.entries
        names = sorted(name.removesuffix(".json") for name in self._structures(step))
        return names == kind.structures and self._reads_as(kind, directory)

    def _reads_as(self, kind: _Kind, directory: str) -> bool:
        return together(self._texts(kind, directory), directory) == kind.leader.texts

    def _count(self, kind: _Kind, directory: str) -> int:
        calls = [f"{directory}{call}" for call in kind.directories]
        return count_entries(self._directory, [directory.removesuffix("/"), *calls])

    def _texts(self, kind: _Kind, directory: str) -> Sequence[bytes | None]:
        """The bytes of a step's call order and structures."""
        names = text_files(kind.structures, directory, self._suffix)
        return read_texts(self._directory, names, LARGEST_TEXTS)

    def _fill(self, kind: _Kind, names: Sequence[str], hashes: bytes, memory: memoryview) -> bool:
        running = [
            self._pool.submit(part.fill, self._directory, names, hashes, memory) for part in kind.parts[1:]
        ]
        try:
            sound = all(part.fill(self._directory, names, hashes, memory) for part in kind.parts[:1])
        finally:
            # The memory is somebody else's afterwards.
            wait(running)
        return sound and all(part.result() for part in running)
