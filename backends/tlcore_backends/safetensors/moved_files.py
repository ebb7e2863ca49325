"""Files that tensors are moved into by several threads, none of which reads them here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tlcore.alike import Move
from tlcore.errors import BackendError
from tlcore.record import Record
from tlcore.storage import Appending, SupportsAppend

_NO_FILE = -1


class CannotMoveError(Exception):
    """Not all tensors could be moved, or are sound: whoever reads them says why."""


@runtime_checkable
class _HasHandle(Appending, Protocol):
    def fileno(self) -> int: ...


class _Batch:
    """Tensors that one call moves; ``left`` are those that nobody has written yet."""

    def __init__(self, move: Move, count: int) -> None:
        self.move = move
        self.left = dict.fromkeys(range(count))


class UnreadTensor(NamedTuple):
    """The bytes of one of them."""

    batch: _Batch
    number: int
    nbytes: int


class MovedFiles:
    """The files of ``store`` whose tensors ``pool`` moves.

    They are written while they are laid out, and get their names when all tensors have proven sound.
    """

    def __init__(self, store: SupportsAppend, pool: Executor) -> None:
        self._store, self._pool = store, pool
        self._files: list[_File] = []
        self._batches: list[_Batch] = []
        self._running: list[Future[bool]] = []

    def unread(self, records: Sequence[Record], move: Move) -> list[UnreadTensor]:
        """What stands for the bytes of records, to be written into one of the files."""
        batch = _Batch(move, len(records))
        self._batches.append(batch)
        sizes = [math.prod(record.shape) * record.dtype.itemsize for record in records]
        return [UnreadTensor(batch, number, nbytes) for number, nbytes in enumerate(sizes)]

    def begin(self, name: str, reserve: int) -> Appending:
        """A file whose tensors begin at ``reserve``. Raises BackendError, CannotMoveError."""
        file = self._store.begin(name, reserve)
        if not isinstance(file, _HasHandle):
            file.abandon()
            raise CannotMoveError
        self._files.append(_File(file, name, reserve, self._start))
        return self._files[-1]

    def _start(self, batch: _Batch, numbers: Sequence[int], places: Sequence[int], handle: int) -> None:
        for number in numbers:
            del batch.left[number]
        self._running.append(self._pool.submit(batch.move(numbers, places), handle))

    def publish(self, published: Callable[[str, int], None]) -> None:
        """Give all files their names, and tell each with its size. Raises BackendError, CannotMoveError."""
        # Of the same content as another, and so written once.
        for batch in self._batches:
            if batch.left:
                self._start(batch, list(batch.left), [-1] * len(batch.left), _NO_FILE)
        for running in self._running:
            if not _is_sound(running):
                raise CannotMoveError
        for file in self._files:
            file.finish()
            published(file.name, file.nbytes)

    def abandon(self) -> None:
        """Forget all files that have no name yet."""
        for running in self._running:
            running.cancel()
        for running in self._running:
            with suppress(BaseException):
                running.result()
        for file in self._files:
            file.remove()


def _is_sound(running: Future[bool]) -> bool:
    try:
        return running.result()
    except Exception:
        # What cannot be written this way is tried in the other, which raises as it should.
        return False


class _File:
    def __init__(
        self,
        file: _HasHandle,
        name: str,
        reserve: int,
        start: Callable[[_Batch, Sequence[int], Sequence[int], int], None],
    ) -> None:
        self.name, self.nbytes = name, reserve
        self._file, self._start = file, start
        self._head = b""

    @property
    def target(self) -> str:
        """What it will be."""
        return self._file.target

    def write(self, parts: Sequence[Any]) -> int:
        """Have `UnreadTensor` written one after the other."""
        begin = self.nbytes
        for batch, group in groupby(parts, attrgetter("batch")):
            numbers, places = [], []
            for part in group:
                numbers.append(part.number)
                places.append(self.nbytes)
                self.nbytes += part.nbytes
            self._start(batch, numbers, places, self._file.fileno())
        return self.nbytes - begin

    def publish(self, head: bytes = b"") -> None:
        """Note how the file begins."""
        self._head = head

    def finish(self) -> None:
        """Give the file its name. Raises BackendError."""
        try:
            self._file.publish(self._head)
        except OSError as error:
            raise BackendError(f"cannot write {self.target}: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Nothing: the file is written until all of them are abandoned."""

    def remove(self) -> None:
        """Forget the file; nothing happens to one that has its name."""
        self._file.abandon()
