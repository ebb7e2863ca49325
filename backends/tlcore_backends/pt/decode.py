"""Tensors from ``.pt`` files without unpickling: the pickle in one is only looked at, never run.

A ``.pt`` file is a zip archive with a small pickle that names dtype, shape and storage, and the storage's
bytes. Only what `torch.save` writes for one plain contiguous tensor is accepted, in stored (not compressed)
entries, so that a file can neither run code nor grow when it is read.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from tlcore.layout.dtypes import item_size, torch_dtype
from tlcore.record import tensor_from_bytes

from .encode import STORAGES
from .zip_parts import END, ENTRY, LOCAL, LOCATOR, WIDE_END, ZIP64, PtError, unpack, wide

if TYPE_CHECKING:
    import torch

_LARGEST_DIRECTORY = 1 << 16
_LARGEST_PICKLE = 1 << 16
_MOST_DIMENSIONS = 64
_DTYPES = {f"torch {storage}": dtype for dtype, storage in STORAGES.items()}
_UNTYPED = ("torch.storage UntypedStorage", "torch UntypedStorage")


class Global(NamedTuple):
    """A name that the pickle refers to; it stays a name."""

    name: str


class Call(NamedTuple):
    """A call that the pickle asks for; it is never made."""

    function: Any
    arguments: Any


class Stored(NamedTuple):
    """A reference to something outside the pickle, as torch makes for a storage."""

    reference: Any


def decode(data: bytes) -> torch.Tensor:
    """The tensor of a ``.pt`` file's bytes, on the CPU. Raises PtError."""
    name, shape, payload = parts(data)
    dtype = torch_dtype(name)
    if dtype is None:
        raise PtError(f"this version of torch has no dtype {name}")
    try:
        return tensor_from_bytes(bytearray(payload), dtype, shape)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise PtError(str(error)) from None


def parts(data: bytes) -> tuple[str, tuple[int, ...], memoryview]:
    """The dtype's name, shape and payload of the tensor in a ``.pt`` file's bytes. Raises PtError."""
    entries = dict(_entries(data))
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PtError("not a torch.save archive")
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(order) != sys.byteorder.encode():
        raise PtError("written on a machine with another byte order")
    key, dtype, shape = described(_value(entries[pickles[0]]))
    payload = entries.get(f"{prefix}data/{key}")
    if payload is None:
        raise PtError("its payload is missing")
    if prod(shape) * (item_size(dtype) or 0) != payload.nbytes:
        raise PtError(f"{payload.nbytes} bytes do not make a {dtype} tensor of shape {shape}")
    return dtype, shape, payload


def _entries(data: bytes) -> Iterator[tuple[str, memoryview]]:
    """The archive's entries by name. Raises PtError for a compressed or misplaced one."""
    view = memoryview(data)
    begin, size = _directory(view)
    position, end = begin, begin + size
    while position < end:
        fields = unpack(ENTRY, view, position, b"PK\x01\x02")
        method, (packed, plain) = fields[4], fields[8:10]
        name_size, extra_size, comment_size, offset = *fields[10:13], fields[16]
        position += ENTRY.size
        name = bytes(view[position : position + name_size])
        extra = view[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        plain, packed, offset = wide(extra, [plain, packed, offset])
        if method != 0 or plain != packed:
            raise PtError("it is compressed, which torch.save never does")
        local = unpack(LOCAL, view, offset, b"PK\x03\x04")
        start = offset + LOCAL.size + local[9] + local[10]
        if start + plain > len(view):
            raise PtError("it ends too early")
        yield name.decode("utf-8", "replace"), view[start : start + plain]


def _directory(view: memoryview) -> tuple[int, int]:
    """Where the archive's central directory begins, and its size."""
    at = len(view) - END.size
    size, begin = unpack(END, view, at, b"PK\x05\x06")[5:7]
    if begin == ZIP64:
        locator = unpack(LOCATOR, view, at - 20, b"PK\x06\x07")
        size, begin = unpack(WIDE_END, view, locator[2], b"PK\x06\x06")[8:10]
    if size > _LARGEST_DIRECTORY or begin + size > len(view):
        raise PtError("its directory is damaged")
    return begin, size


def described(value: Any) -> tuple[str, str, tuple[int, ...]]:
    """Storage key, dtype's name and shape of the tensor that an inert pickle describes. Raises PtError."""
    arguments = value.arguments if isinstance(value, Call) else None
    if not isinstance(arguments, tuple) or not isinstance(value.function, Global):
        raise PtError(f"it holds a {_named(value)}, not a tensor")
    function = value.function.name
    expected = {"torch._utils _rebuild_tensor_v2": 6, "torch._utils _rebuild_tensor_v3": 7}
    if function not in expected or len(arguments) != expected[function]:
        raise PtError(f"it holds a {_named(value)}, not a plain tensor")
    stored, offset, shape, strides = arguments[:4]
    reference = stored.reference if isinstance(stored, Stored) else None
    if not isinstance(reference, tuple) or len(reference) != 5 or not _sizes(shape):
        raise PtError("it holds no plain tensor")
    _, kind, key, _, _ = reference
    dtype = _dtype(kind, arguments[6] if len(arguments) == 7 else None)
    contiguous = _sizes(strides) and (0 in shape or _is_contiguous(shape, strides))
    if dtype is None or not isinstance(key, str) or offset != 0 or not contiguous:
        raise PtError("it holds no plain contiguous tensor")
    if prod(shape) * (item_size(dtype) or 0) > 1 << 62:
        raise PtError("its shape is too large")
    return key, dtype, shape


def _sizes(value: Any) -> bool:
    sized = isinstance(value, tuple) and len(value) <= _MOST_DIMENSIONS
    return sized and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=False):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return len(shape) == len(strides)


def _dtype(kind: Any, stated: Any) -> str | None:
    if not isinstance(kind, Global):
        return None
    if kind.name in _UNTYPED and isinstance(stated, Global):
        module, _, name = stated.name.partition(" ")
        return name if module == "torch" and item_size(name) is not None else None
    return _DTYPES.get(kind.name) if stated is None else None


def _named(value: Any) -> str:
    while isinstance(value, Call):
        value = value.function
    return value.name.rpartition(" ")[2] if isinstance(value, Global) else type(value).__name__


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "NEWFALSE": lambda: False,
    "NEWTRUE": lambda: True,
    "NONE": lambda: None,
    "MARK": lambda: _MARK,
}
_LITERALS = frozenset(("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _value(pickled: memoryview) -> Any:
    """What a pickle would build, as inert data: calls and names stand for themselves. Raises PtError."""
    if len(pickled) > _LARGEST_PICKLE:
        raise PtError("its description is too large for one tensor")
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(bytes(pickled)):
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo)
    except PtError:
        raise
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise PtError(f"its description is damaged ({error})") from None
    raise PtError("its description is damaged")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in _LITERALS:
        stack.append(argument)
    elif name == "GLOBAL":
        stack.append(Global(argument))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "TUPLE":
        begin = len(stack) - 1 - [item is _MARK for item in reversed(stack)].index(True)
        stack[begin:] = [tuple(stack[begin + 1 :])]
    elif name in _TUPLES:
        begin = len(stack) - _TUPLES[name]
        if begin < 0:
            raise IndexError("the stack is empty")
        stack[begin:] = [tuple(stack[begin:])]
    elif name == "BINPERSID":
        stack.append(Stored(stack.pop()))
    elif name == "REDUCE":
        arguments = stack.pop()
        stack.append(Call(stack.pop(), arguments))
    elif name != "PROTO":
        raise PtError(f"its description holds {name}, which no plain tensor needs")
