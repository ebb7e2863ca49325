"""The operations of a pickle with their arguments, one after the other; nothing is made of them here."""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any

_Take = Callable[[bytes, int], tuple[Any, int]]


def operations(pickled: bytes) -> Iterator[tuple[str, Any]]:
    """Each operation's name and argument. Raises ValueError, IndexError or struct.error for damage."""
    at, end = 0, len(pickled)
    while at < end:
        known = _CODES[pickled[at]]
        at += 1
        if known is None:
            raise ValueError(f"there is no operation {pickled[at - 1]:#x}")
        name, take = known
        if take is None:
            yield name, None
        else:
            argument, at = take(pickled, at)
            yield name, argument


def _number(form: str) -> _Take:
    packed = struct.Struct(form)

    def take(pickled: bytes, at: int) -> tuple[Any, int]:
        return packed.unpack_from(pickled, at)[0], at + packed.size

    return take


def _sized(form: str, read: Callable[[bytes], Any]) -> _Take:
    """What stands behind its own length."""
    packed = struct.Struct(form)

    def take(pickled: bytes, at: int) -> tuple[Any, int]:
        begin = at + packed.size
        end = begin + packed.unpack_from(pickled, at)[0]
        if end > len(pickled):
            raise ValueError("it ends too early")
        return read(pickled[begin:end]), end

    return take


def _other(argument: pickletools.ArgumentDescriptor) -> _Take:
    """What is rare, as Python's own tools read it."""

    def take(pickled: bytes, at: int) -> tuple[Any, int]:
        stream = io.BytesIO(pickled)
        stream.seek(at)
        return argument.reader(stream), stream.tell()

    return take


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _line(pickled: bytes, at: int) -> int:
    end = pickled.find(b"\n", at)
    if end < 0:
        raise ValueError("it ends too early")
    return end


def _name(pickled: bytes, at: int) -> tuple[str, int]:
    """A module and a name in it, each a line."""
    middle = _line(pickled, at)
    end = _line(pickled, middle + 1)
    return f"{pickled[at:middle].decode()} {pickled[middle + 1 : end].decode()}", end + 1


# Those that torch writes by the thousand.
_OFTEN: dict[str, _Take] = {
    "uint1": _number("<B"),
    "uint2": _number("<H"),
    "int4": _number("<i"),
    "uint4": _number("<I"),
    "float8": _number(">d"),
    "unicodestring1": _sized("<B", _text),
    "unicodestring4": _sized("<I", _text),
    "stringnl_noescape_pair": _name,
}


def _codes() -> list[tuple[str, _Take | None] | None]:
    found: list[tuple[str, _Take | None] | None] = [None] * 256
    for opcode in pickletools.opcodes:
        argument = opcode.arg
        take = None if argument is None else _OFTEN.get(argument.name) or _other(argument)
        found[ord(opcode.code)] = opcode.name, take
    return found


_CODES = _codes()
