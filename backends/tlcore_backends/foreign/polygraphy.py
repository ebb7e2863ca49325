"""What Polygraphy saves of its runners' results: one JSON file with the arrays in base64."""

from __future__ import annotations

import binascii
import mmap
import re
import string
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.run_files import parse
from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json

from .arrays import describe_npy, read_npy
from .documents import Found
from .files import DumpFiles, shown_path
from .plain import described
from .source import ONE_RANK, ForeignSource
from .torch_files import torch_file

_CLASS = "polygraphy_class"
_OLD = "polygraphy_serialized_json_type"
_KIND = re.compile(rb'"(?:polygraphy_class|polygraphy_serialized_json_type)":\s*"(\w+)"\s*\}\s*\Z')
# No array is shorter in base64, for its header alone is longer; few names are as long.
_SHORTEST = 160
_BASE64 = (string.ascii_letters + string.digits + "+/=").encode()
# Begins with what no name does: others may be numbers with a colon between them.
_STANDING_IN = re.compile(r"\0(\d{1,15}):(\d{1,15})")
_TIME = re.compile(r"-\d\d/\d\d/\d\d-\d\d:\d\d:\d\d\Z")
_TAIL = 200
# Of a file that is not on a disk of this machine, all is held in memory to be looked through.
_LARGEST_REMOTE = 1 << 30
_LOOKED_AT = 20


class Polygraphy(ForeignSource):
    """Each iteration is a step, each output a module's of its name.

    Where there are several runners, their names stand before the outputs'.
    """

    tool = "polygraphy"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """A file that ends as such results do, or a directory with one."""
        kinds = {name: kind for name in _named(files)[:_LOOKED_AT] if (kind := _kind(files, name))}
        found = [name for name, kind in kinds.items() if kind == "RunResults"]
        if len(found) > 1:
            return f"holds several results of Polygraphy ({', '.join(found)}): open one of them"
        if not found:
            others = [f"{name}: is {kind} of Polygraphy, not RunResults" for name, kind in kinds.items()]
            return others[0] if others else None
        return {"world_size": 1, "file": found[0]}

    @cached_property
    def _file(self) -> str:
        return next(name for name in _named(self.files) if _kind(self.files, name) == "RunResults")

    @cached_property
    def _runners(self) -> list[tuple[str, list[Json]]]:
        """Each runner's name and iterations, with where its arrays stand in place of them."""
        document = parse(_outline(self.files, self._file), self._where)
        if _OLD in document:
            raise ReadError(
                f"{self._where}: of a Polygraphy that wrote no base64; load and save it with a newer one"
            )
        runners = document.get("lst")
        try:
            found = [(_restored(self.files, self._file, name), list(each)) for name, each in runners]
            if all(isinstance(each["outputs"], dict) for _, iterations in found for each in iterations):
                return found
        except (TypeError, ValueError, KeyError):
            pass
        raise ReadError(f"{self._where}: damaged, not a list of runners and their iterations")

    @property
    def _where(self) -> str:
        return f"{shown_path(self.files, self._file)}"

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """The iterations."""
        return dict.fromkeys(range(max((len(each) for _, each in self._runners), default=0)), ONE_RANK)

    def found(self, step: int, rank: int) -> list[Found]:
        """The outputs of all runners in their order."""
        result: list[Found] = []
        for runner, iterations in self._runners:
            outputs = iterations[step]["outputs"] if step < len(iterations) else {}
            before = "" if len(self._runners) == 1 else f"{_TIME.sub('', runner)}."
            for key, value in outputs.items():
                name = _restored(self.files, self._file, key)
                result += self._output(f"{before}{name}", value)
        return result

    def _output(self, name: str, value: Any) -> Iterator[Found]:
        values = value.get("values") if isinstance(value, dict) else None
        held = values if isinstance(values, dict) else value
        if not isinstance(held, dict) or not isinstance(text := held.get("array", held.get("tensor")), str):
            raise ReadError(f"{self._where}: damaged, {name!r} has no array")
        at = _STANDING_IN.fullmatch(text)
        if at is None:
            raise ReadError(f"{self._where}: damaged, the array of {name!r} is none")
        span = [int(at[1]), int(at[2])]
        decoded = _Decoded(self.files, self._file, *span)
        if "array" in held:
            each = describe_npy(decoded, name, name)
        else:
            opened = torch_file(decoded, name, decoded.size)
            leaves = [described(opened, leaf) for _, leaf in opened.leaves()]
            each = next((leaf for leaf in leaves if leaf is not None), Found("", "", (), skipped="no tensor"))
        place = None if each.place is None else {"span": span, "within": each.place}
        yield each._replace(module=name, direction="outputs", path=(), place=place)

    def whole(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor."""
        place = record["place"]
        decoded = _Decoded(self.files, self._file, *place["span"])
        return read_npy(decoded, {**record, "place": place["within"]})


class _Decoded:
    """What a text in base64 holds, as a file of any name."""

    store = None
    first = 64 << 10

    def __init__(self, files: DumpFiles, file: str, begin: int, end: int) -> None:
        self.url = files.url
        self._files, self._file, self._begin, self._end = files, file, begin, end
        padding = files.read(file, max(begin, end - 2), end).count(b"=")
        self.size = (end - begin) // 4 * 3 - padding

    def open(self, name: str) -> None:
        """It is no file."""

    def handle(self, name: str) -> None:
        """It is no file."""

    def identity(self, name: str) -> None:
        """It is no file."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)``, of which only those of whole groups of characters are decoded."""
        stop = self.size if end is None else min(end, self.size)
        if start >= stop:
            return b""
        first, last = start // 3 * 4, -(-stop // 3) * 4
        text = self._files.read(self._file, self._begin + first, min(self._begin + last, self._end))
        try:
            found = binascii.a2b_base64(text)
        except binascii.Error as error:
            raise ReadError(f"{self.url}/{self._file}: {name!r} is damaged ({error})") from None
        skip = start - first // 4 * 3
        return found[skip : skip + stop - start]


def _named(files: DumpFiles) -> list[str]:
    """The files that may be such results: one that was given alone may have any name."""
    names = sorted(files.top)
    return names if len(names) == 1 else [name for name in names if name.endswith(".json")]


def _kind(files: DumpFiles, name: str) -> str | None:
    """The class of Polygraphy's that a file holds, by its end; None for any other file."""
    size = files.top[name]
    if files.read(name, 0, 1) != b"{":
        return None
    found = _KIND.search(files.read(name, max(0, size - _TAIL), size))
    return None if found is None else found[1].decode()


def _outline(files: DumpFiles, name: str) -> bytes:
    """The file with ``\\0<begin>:<end>`` in place of each long text in base64."""
    opened = files.open(name)
    if opened is not None:
        with opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _without_arrays(mapped)
    if files.top[name] > _LARGEST_REMOTE:
        raise ReadError(f"{shown_path(files, name)}: too large to be read from there, copy it to a disk")
    return _without_arrays(files.read(name))


def _without_arrays(data: bytes | mmap.mmap) -> bytes:
    """The same without what stands between two quotes and is long and base64 alone, which no JSON between
    two texts is."""
    parts, done = [], 0
    begin = data.find(b'"') + 1
    while begin and (end := data.find(b'"', begin)) >= 0:
        if end - begin >= _SHORTEST and not data[begin:end].translate(None, _BASE64):
            parts += [data[done:begin], b"\\u0000%d:%d" % (begin, end)]
            done = end
        begin = end + 1
    return b"".join([*parts, data[done:]])


def _restored(files: DumpFiles, file: str, name: Any) -> str:
    """A name that was so long and plain that it was taken for an array."""
    at = _STANDING_IN.fullmatch(str(name))
    return str(name) if at is None else files.read(file, int(at[1]), int(at[2])).decode("ascii", "replace")
