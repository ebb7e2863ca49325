"""A run's files in any store, read with care: what a reader and the sources of backends share.

A run may come from anybody: a name cannot leave it, a listing that says so is refused, and a document is
neither larger nor deeper than a capture writes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, BinaryIO, NoReturn

from ..errors import BackendError, ReadError, missing
from ..storage import Buffer, Store, SupportsFiles, SupportsLevels, SupportsManyReads, SupportsNames
from .checksums import KEY as CHECKSUM
from .checksums import without_checksum

RUN_FILE = "run.json"
# There: what is not in the run although it might be expected, and why.
REMARKS = "remarks"
# Of what other tools dump: the number of a first step, where it is not 0.
COUNTS_FROM = "counts_from"
# The step.json of a model with 100 000 captured tensors has about 100 MB and six million values.
LARGEST_JSON = 256 << 20
MOST_VALUES = 16_000_000
# What every step's document has; whatever else stands there is the step's own.
STEP_KEYS = frozenset(
    {
        *("layout", "step", "rank", "started", "ended", "ledger"),
        *("calls", "records", "rows", "structures", "shards", "structures_hash", CHECKSUM),
    }
)
_LEAVES_THE_RUN = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)|\0")
# One request to a store that is not a local disk.
_BLOCK_BYTES = 8 << 20


def remarks_of(document: Mapping[str, Any]) -> list[str]:
    """The remarks of a ``run.json``."""
    found = document.get(REMARKS)
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def is_plain(text: bytes) -> bool:
    """Whether what stands in a JSON text stands so in its strings."""
    return b"\\" not in text and b"\0" not in text


def parse(data: bytes, where: str, all_numbers: bool = False) -> Any:
    """The value of a JSON file. Raises ReadError, naming ``where``, when it is none or too large.

    With ``all_numbers`` it may have NaN and Infinity, which JSON has not.
    """
    if len(data) > LARGEST_JSON:
        raise too_large(where)
    # A text that is shorter cannot have so many.
    if len(data) > MOST_VALUES and data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_VALUES:
        raise ReadError(f"{where}: holds more than {MOST_VALUES} values")
    try:
        return json.loads(data, parse_constant=None if all_numbers else _no_number)
    except RecursionError:
        raise ReadError(f"{where}: damaged, not JSON (nested too deep)") from None
    except ValueError as error:
        raise ReadError(f"{where}: damaged, not JSON ({error})") from None


def too_large(where: str) -> ReadError:
    """The error for a JSON file larger than `LARGEST_JSON`."""
    return ReadError(f"{where}: larger than any file of this kind ({LARGEST_JSON >> 20} MiB)")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


class RunFiles:
    """The files of the run whose directory is ``store``: their sizes, their bytes, their JSON."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url
        # Whether an object has a protocol's methods takes long to find out, and is asked for every tensor.
        self._local = store if isinstance(store, SupportsFiles) else None
        self._listed: dict[str, Mapping[str, int]] = {}
        self._named: tuple[tuple[str, str], Collection[str]] = ("", ""), ()

    @property
    def is_local(self) -> bool:
        """Whether the run lies on a disk of this machine."""
        return self._local is not None

    @cached_property
    def directory(self) -> str | None:
        """The run's directory, where it lies on a disk of this machine."""
        return None if self._local is None else self._local.path()

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Every finished file and its size in bytes, as they were at first use."""
        return self._listing("")

    @cached_property
    def top(self) -> Mapping[str, int]:
        """The files that lie directly in the run, and their sizes, as they were at first use."""
        if not isinstance(self.store, SupportsLevels):
            return {name: size for name, size in self.sizes.items() if "/" not in name}
        try:
            return {entry.name: entry.size for entry in self.store.level().blobs}
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    def sizes_in(self, directory: str) -> Mapping[str, int]:
        """The finished files below a directory such as ``step_0``, and perhaps others, and their sizes.

        Only this directory is listed, so that one step of a long run costs no more than of a short one.
        """
        if "sizes" in self.__dict__:
            return self.sizes
        if directory not in self._listed:
            self._listed[directory] = self._listing(f"{directory}/")
        return self._listed[directory]

    def names_in(self, directory: str, ending: str) -> Collection[str]:
        """The names with this ending that `sizes_in` has, where sizes are not known and would take longer.

        Those that were asked for last are kept.
        """
        if self._named[0] != (directory, ending):
            names = self._all_names_in(directory)
            self._named = (directory, ending), self._within([name for name in names if name.endswith(ending)])
        return self._named[1]

    def _all_names_in(self, directory: str) -> Collection[str]:
        store = self.store
        if self.is_listed or directory in self._listed or not isinstance(store, SupportsNames):
            return self.sizes_in(directory)
        try:
            return store.names(f"{directory}/")
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    @property
    def is_listed(self) -> bool:
        """Whether all files are known already."""
        return "sizes" in self.__dict__

    def size(self, name: str) -> int | None:
        """A finished file's size in bytes, None for a missing one; `sizes_in` says what this costs."""
        return self._near(name).get(name)

    def _near(self, name: str) -> Mapping[str, int]:
        directory, slash, _ = name.partition("/")
        return self.sizes_in(directory) if slash else self.top

    def _listing(self, prefix: str) -> Mapping[str, int]:
        try:
            found = {entry.name: entry.size for entry in self.store.list(prefix)}
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        self._within(found)
        return found

    def _within(self, names: Collection[str]) -> Collection[str]:
        """These names. Raises ReadError where one leaves the run."""
        if bad := next(filter(_LEAVES_THE_RUN.search, names), None):
            raise ReadError(f"{self.url}: holds {bad!r}, a name that leads out of it")
        return names

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a file, all of it by default.

        Raises MissingError or ReadError, also for a name that leaves the run.
        """
        try:
            return self.store.get(name, start, end)
        except FileNotFoundError:
            raise missing("file", name, self.url, self._near(name)) from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        except (MemoryError, OverflowError):
            raise ReadError(f"{self.url}/{name}: larger than this machine's memory") from None

    def read_many(self, names: Sequence[str], sizes: Sequence[int]) -> Sequence[memoryview | None]:
        """The bytes of whole files that should have these sizes; None for what must be read one by one."""
        if isinstance(self.store, SupportsManyReads):
            with suppress(BackendError, OSError, MemoryError, OverflowError):
                return self.store.get_many(names, sizes)
        return [None] * len(names)

    def json(self, name: str) -> Any:
        """A JSON file's value without its checksum. Raises MissingError, or ReadError when it is no JSON."""
        return without_checksum(parse(self.json_bytes(name), f"{self.url}/{name}"))

    def json_bytes(self, name: str) -> bytes:
        """The bytes of a JSON file, of a too large one not all. Raises MissingError or ReadError."""
        # Where the listing is not known yet, finding out costs more than reading.
        if self.is_listed and self.sizes.get(name, 0) > LARGEST_JSON:
            raise too_large(f"{self.url}/{name}")
        return self.read(name, 0, LARGEST_JSON + 1)

    def identity(self, name: str) -> Hashable | None:
        """Equal for two names of one stored file, None where a store has no such names or it is missing."""
        return None if self._local is None else self._local.identity(name)

    def open(self, name: str) -> BinaryIO | None:
        """A local file, to be read piece by piece; None where the run's store only serves ranges.

        Raises as `read` does.
        """
        if self._local is None:
            return None
        try:
            return self._local.open_file(name)
        except FileNotFoundError:
            raise missing("file", name, self.url, self._near(name)) from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    def advise(self, name: str, begin: int = 0, end: int = 0) -> None:
        """Tell the system that these bytes of a local file will be read soon; never raises."""
        try:
            file = self.open(name)
            if file is not None:
                with file:
                    os.posix_fadvise(file.fileno(), begin, max(0, end - begin), os.POSIX_FADV_WILLNEED)
        except (ReadError, OSError, AttributeError, TypeError, ValueError, OverflowError):
            # Whoever reads it reports what is wrong; some systems cannot be told.
            return

    def stream(self, name: str, begin: int) -> FileStream | BlockStream:
        """The bytes of a file from ``begin`` on, for reading piece by piece. Raises as `read` does."""
        file = self.open(name)
        if file is not None:
            return FileStream(file, begin)
        size = self.size(name) or 0
        return BlockStream(lambda start, end: self.read(name, start, end), size, begin)


class FileStream:
    """A file of this machine from a byte on."""

    def __init__(self, file: BinaryIO, begin: int) -> None:
        self._file, self._begin = file, begin

    def readinto(self, begin: int, target: memoryview) -> int:
        """Fill ``target`` with the bytes from ``begin`` on; returns how many there were."""
        try:
            self._file.seek(self._begin + begin)
            return self._file.readinto(target)  # type: ignore[attr-defined, no-any-return]  # unbuffered
        except OSError as error:
            raise ReadError(str(error)) from error

    def skip(self, count: int) -> None:
        """Leave out so many bytes at the beginning."""
        self._begin += count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BlockStream:
    """What ``read(begin, end)`` gives of ``size`` bytes, from ``skipped`` on, in blocks of a few megabytes.

    The last block is kept.
    """

    def __init__(self, read: Callable[[int, int], Buffer], size: int, skipped: int = 0) -> None:
        self._read, self._size, self._skipped = read, size, skipped
        self._begin, self._block = 0, memoryview(b"")

    def readinto(self, begin: int, target: memoryview) -> int:
        """Fill ``target`` with the bytes from ``begin`` on; returns how many there were."""
        done = 0
        begin += self._skipped
        while done < len(target):
            part = self._at(begin + done, len(target) - done)
            if not part:
                break
            target[done : done + len(part)] = part
            done += len(part)
        return done

    def skip(self, count: int) -> None:
        """Leave out so many bytes at the beginning."""
        self._skipped += count

    def close(self) -> None:
        """Forget the block."""
        self._block = memoryview(b"")

    def _at(self, offset: int, most: int) -> memoryview:
        within = offset - self._begin
        if not 0 <= within < len(self._block):
            end = min(offset + max(_BLOCK_BYTES, most), self._size)
            self._block = memoryview(self._read(offset, end) if offset < end else b"").cast("B")
            self._begin, within = offset, 0
        return self._block[within : within + most]
