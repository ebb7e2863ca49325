"""The data files of a step too large to share a segment: written while its tensors come, without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from tlcore.errors import BackendError
from tlcore.layout.templates import quoted
from tlcore.storage import Appending, Buffer, SupportsAppend

from .columns import ALIGNMENT, EMPTY_HEAD_BYTES, Column, head_bytes, head_of
from .data_file import DataFile
from .described import Slot

# Kept free in front of the tensors. Each further file of a step gets twice the room of the one before.
RESERVE = 256 << 10
_LARGEST_RESERVE = 16 << 20
# Beside names and shapes: offsets, quotes, and what marks an alias or a dtype.
_ROOM_FOR_ENTRY = 160


class Unread(Protocol):
    """The bytes of a tensor that the file it is written to fetches itself."""

    @property
    def nbytes(self) -> int:
        """How many they are."""
        ...


class Tensor(NamedTuple):
    """A tensor of the step: its array's number in the index, slot, hash, and bytes (only lent)."""

    number: int
    slot: Slot
    digest: str
    data: Buffer | Unread


class StepFiles:
    """Files into which one step goes, each at most about ``most_bytes`` large.

    ``name_of`` gives the name of each, ``published`` is told name and size of one that is whole. ``taken``
    has the content that is stored already by the number of its array. `columns` are the arrays so far.
    """

    def __init__(
        self,
        store: SupportsAppend,
        name_of: Callable[[int], str],
        most_bytes: int,
        published: Callable[[str, int], None],
        taken: dict[object, int],
    ) -> None:
        self._store = store
        self._name_of = name_of
        self._most_bytes = most_bytes
        self._published = published
        self._taken = taken
        self._file: _StepFile | None = None
        self.files: list[DataFile] = []
        self.columns: dict[int, Column] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in memory."""
        return self._file.late_bytes if self._file is not None else 0

    def write(self, tensors: Iterable[Tensor]) -> None:
        """Write tensors. Raises BackendError."""
        for tensor in tensors:
            if tensor.number in self.columns:
                raise BackendError(f"{tensor.slot.tail} was captured twice in one step")
            file = self._file
            if file is not None and not file.has_room(tensor, self._most_bytes):
                self.finish()
                file = None
            if file is None:
                file = self._file = self._begin()
            column = Column.of_one(tensor.slot, bytes.fromhex(tensor.digest))
            column.file = len(self.files)
            original = self._taken.setdefault(column.content, tensor.number)
            column.same_as = None if original == tensor.number else original
            self.columns[tensor.number] = column
            file.add(tensor, column)
        if self._file is not None:
            self._file.flush()
            if self._file.nbytes >= self._most_bytes:
                # What waits for its end is in memory.
                self.finish()

    def finish(self) -> None:
        """Publish the file that is open. Raises BackendError."""
        file, self._file = self._file, None
        if file is not None:
            whole = file.publish()
            self.files.append(whole)
            self._published(whole.name, whole.nbytes)

    def abandon(self) -> None:
        """Forget the file that is open."""
        if self._file is not None:
            self._file.abandon()

    def _begin(self) -> _StepFile:
        name = self._name_of(len(self.files))
        reserve = min(RESERVE << min(len(self.files), 16), _LARGEST_RESERVE)
        return _StepFile(self._store.begin(name, reserve), name, reserve)


class _StepFile:
    """One of them: room for the header, tensors as they come, and last those that would misalign others."""

    def __init__(self, file: Appending, name: str, reserve: int) -> None:
        self.name = name
        self.late_bytes = 0
        self._file = file
        self._reserve = reserve
        self._position = 0
        self._header_bytes = EMPTY_HEAD_BYTES
        self._keys: set[str] = set()
        self._columns: dict[int, Column] = {}
        self._own: list[Column] = []
        # Bytes, or what the file fetches itself.
        self._waiting: list[Any] = []
        self._late: list[tuple[Column, bytes | Unread]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors so far."""
        return self._position + self.late_bytes

    def has_room(self, tensor: Tensor, most_bytes: int) -> bool:
        """Whether another tensor should follow; a file without any takes each."""
        if not self._columns:
            return True
        entry = 3 * len(quoted(tensor.slot.tail)) + 20 * len(tensor.slot.row) + _ROOM_FOR_ENTRY
        return self.nbytes < most_bytes and self._header_bytes + entry <= self._reserve

    def add(self, tensor: Tensor, column: Column) -> None:
        """Note a tensor: call `flush` before its bytes change."""
        column.take_key(self._keys)
        self._columns[tensor.number] = column
        if column.same_as is None:
            data = tensor.data
            lent = memoryview(data) if isinstance(data, Buffer) else data
            if lent.nbytes != tensor.slot.nbytes:
                raise BackendError(f"{tensor.slot.tail} came without its bytes")
            self._own.append(column)
            if tensor.slot.nbytes % ALIGNMENT:
                self._late.append((column, bytes(data) if isinstance(data, Buffer) else data))
                self.late_bytes += tensor.slot.nbytes
            else:
                column.begin = self._position
                self._position += tensor.slot.nbytes
                self._waiting.append(data)
        self._header_bytes += head_bytes(column, self._columns)

    def flush(self) -> None:
        """Write the bytes of all tensors added so far. Raises BackendError."""
        waiting, self._waiting = self._waiting, []
        try:
            self._file.write(waiting)
        except OSError as error:
            self.abandon()
            raise self._refused(error) from error

    def publish(self) -> DataFile:
        """Give the file its name. Raises BackendError."""
        self._late.sort(key=lambda each: -each[0].slot.dtype.itemsize)
        for column, data in self._late:
            column.begin = self._position
            self._position += column.slot.nbytes
            self._waiting.append(data)
        self.flush()
        head = head_of(self._columns, self._own, self._reserve)
        if len(head) > self._reserve:
            self.abandon()
            raise BackendError(f"{self.name}: {len(head)} bytes of header do not fit into {self._reserve}")
        try:
            self._file.publish(head)
        except OSError as error:
            self.abandon()
            raise self._refused(error) from error
        return DataFile.of(self.name, self._reserve + self._position, head)

    def abandon(self) -> None:
        """Forget the file."""
        self._file.abandon()

    def _refused(self, error: OSError) -> BackendError:
        return BackendError(f"cannot write {self._file.target}: {error.strerror or error}")
