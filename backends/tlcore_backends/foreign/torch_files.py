"""Files of `torch.save`: what is in them, and where the bytes of each tensor lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size

from ..pt.zip_parts import END, ENTRY, LOCAL, LOCATOR, WIDE_END, ZIP64, PtError, unpack, wide
from .files import FIRST, Readable, StoredAt, once, shown_path
from .pickled import LARGEST_PICKLE, Leaf, TensorAt, leaves, load

_LARGEST_DIRECTORY = 64 << 20
# What an archive has between an entry's name and its bytes is less, so that one read mostly gets both.
_PADDING = 256


def torch_file(files: Readable, file: str, size: int) -> TorchFile:
    """A file of `torch.save`. Raises ReadError for one that is no such archive."""
    return once(files, file, lambda: TorchFile(files, file, size))


class TorchFile:
    """A file of `torch.save`, in the archive format: its value as `pickled` has it, and where bytes lie."""

    def __init__(self, files: Readable, file: str, size: int) -> None:
        """``size`` is the file's. Raises ReadError for a file that is no such archive."""
        self._files, self._file, self._size = files, file, size
        # Small files are read once, of large ones their end.
        self._begin = max(0, size - (files.first if size > FIRST else FIRST))
        try:
            self._tail = memoryview(files.read(file, self._begin, size))
            self._entries = self._listed()
            pickles = [name for name in self._entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise PtError("it is not an archive of torch.save")
            self._prefix = pickles[0].removesuffix("data.pkl")
            self._check_order()
            self._pickled = self._entries[pickles[0]][1]
            if self._pickled > LARGEST_PICKLE:
                raise PtError("its description is too large")
            self.value = load(self._entry(pickles[0]))
        except PtError as error:
            raise ReadError(f"{shown_path(files, file)}: not a .pt file that can be read ({error})") from None

    def leaves(self) -> Iterator[Leaf]:
        """What is in it that is no container, with the keys to it. Raises ReadError for too much."""
        return self._asked(leaves(self.value, self._pickled))

    def _asked(self, found: Iterator[Leaf]) -> Iterator[Leaf]:
        try:
            yield from found
        except PtError as error:
            raise ReadError(f"{shown_path(self._files, self._file)}: {error}") from None

    def at(self, tensor: TensorAt) -> StoredAt:
        """Where a tensor's values lie. Raises ReadError where its storage is not there or too short."""
        name = f"{self._prefix}data/{tensor.key}"
        if name not in self._entries:
            raise ReadError(f"{shown_path(self._files, self._file)}: the storage {tensor.key!r} is missing")
        width = item_size(tensor.dtype) or 1
        try:
            begin, size = self._place(name)
        except PtError as error:
            raise ReadError(f"{shown_path(self._files, self._file)}: {error}") from None
        if (tensor.offset + tensor.span) * width > size:
            text = f"the storage {tensor.key!r} is shorter than its tensor"
            raise ReadError(f"{shown_path(self._files, self._file)}: {text}")
        strides = None if tensor.contiguous else tensor.strides
        return StoredAt(self._file, begin + tensor.offset * width, tensor.dtype, tensor.shape, strides)

    def _check_order(self) -> None:
        name = f"{self._prefix}byteorder"
        if name in self._entries and bytes(self._entry(name)) != sys.byteorder.encode():
            raise PtError("it was written on a machine with another byte order")

    def _listed(self) -> dict[str, tuple[int, int]]:
        """Each entry's offset and size."""
        view = self._directory()
        found: dict[str, tuple[int, int]] = {}
        position = 0
        while position < len(view):
            fields = unpack(ENTRY, view, position, b"PK\x01\x02")
            method, (packed, plain) = fields[4], fields[8:10]
            name_size, extra_size, comment_size, offset = *fields[10:13], fields[16]
            position += ENTRY.size
            name = bytes(view[position : position + name_size]).decode("utf-8", "replace")
            extra = view[position + name_size : position + name_size + extra_size]
            position += name_size + extra_size + comment_size
            plain, packed, offset = wide(extra, [plain, packed, offset])
            if method != 0 or plain != packed:
                raise PtError("it is compressed, which torch.save never does")
            found[name] = offset, plain
        return found

    def _directory(self) -> memoryview:
        at = self._size - END.size
        size, begin = unpack(END, self._tail, at - self._begin, b"PK\x05\x06")[5:7]
        if begin == ZIP64 or size == ZIP64:
            locator = unpack(LOCATOR, self._tail, at - 20 - self._begin, b"PK\x06\x07")
            size, begin = unpack(WIDE_END, self._bytes(locator[2], WIDE_END.size), 0, b"PK\x06\x06")[8:10]
        if size > _LARGEST_DIRECTORY or begin + size > self._size:
            raise PtError("its directory is damaged")
        return self._bytes(begin, size)

    def _place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes begin, and how many they are."""
        offset, size = self._entries[name]
        local = unpack(LOCAL, self._bytes(offset, LOCAL.size), 0, b"PK\x03\x04")
        begin = offset + LOCAL.size + local[9] + local[10]
        if begin + size > self._size:
            raise PtError("it ends too early")
        return begin, size

    def _entry(self, name: str) -> memoryview:
        offset, size = self._entries[name]
        room = LOCAL.size + len(name) + _PADDING
        block = self._bytes(offset, min(room + size, self._size - offset))
        local = unpack(LOCAL, block, 0, b"PK\x03\x04")
        begin = LOCAL.size + local[9] + local[10]
        if begin + size <= len(block):
            return block[begin : begin + size]
        return self._bytes(offset + begin, size)

    def _bytes(self, begin: int, size: int) -> memoryview:
        if begin < 0 or begin + size > self._size:
            raise PtError("it ends too early")
        if begin >= self._begin:
            return self._tail[begin - self._begin : begin - self._begin + size]
        if (handle := self._files.handle(self._file)) is None:
            return memoryview(self._files.read(self._file, begin, begin + size))
        try:
            return memoryview(os.pread(handle.number, size, begin))
        except OSError as error:
            raise ReadError(f"{shown_path(self._files, self._file)}: {error}") from error
