"""What a pickle would build, as inert data: nothing that it names is imported, nothing it asks for is called.

Containers and plain values become themselves; a tensor becomes a `TensorAt`, which says where its bytes lie;
every other object an `Unknown` with its class's name. A pickle may come from anybody.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

from tlcore.layout.dtypes import item_size
from tlcore.layout.names import PathKey

from ..pt.encode import STORAGES
from ..pt.zip_parts import PtError
from .pickle_codes import operations
from .unmade import Made, Name, StorageOf, free_key, holds_all, holds_storage, name_of

LARGEST_PICKLE = 256 << 20
_LEAST_LIMIT = 10_000
_DEEPEST = 100
_MOST_DIMENSIONS = 64
_LARGEST = 1 << 62


class TensorAt(NamedTuple):
    """A plain tensor: in which storage of the archive its values lie, counted in elements, and how."""

    dtype: str
    shape: tuple[int, ...]
    key: str
    offset: int
    strides: tuple[int, ...]
    device: str

    @property
    def span(self) -> int:
        """How many elements of the storage it reaches over, from its offset on."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether its values lie in the storage one after the other."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return 0 in self.shape
            expected *= extent
        return True


class Unknown(NamedTuple):
    """An object of a class that is not opened; ``tensors`` says whether it holds any."""

    cls: str
    tensors: bool


def load(pickled: bytes | memoryview) -> Any:
    """The inert value of a pickle; `plain` makes a node of it readable. Raises PtError for a damaged one."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    if len(pickled) > LARGEST_PICKLE:
        raise PtError("its description is too large")
    try:
        for name, argument in operations(bytes(pickled)):
            if name in _PUSHED:
                stack.append(argument)
            elif name == "STOP":
                return stack.pop()
            elif name not in _IGNORED:
                _OPERATIONS[name](argument, stack, memo)
    except PtError:
        raise
    except KeyError as error:
        raise PtError(f"its description holds {error}, which no dictionary of tensors needs") from None
    except _DAMAGE as error:
        raise PtError(f"its description is damaged ({error})") from None
    raise PtError("its description is damaged")


_DAMAGE = (
    *(IndexError, ValueError, TypeError, AttributeError, RecursionError, UnicodeError),
    *(OverflowError, struct.error),
)
_MARK = object()
_IGNORED = frozenset(("PROTO", "FRAME"))
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING")
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_PUSHED = frozenset((*_TEXTS, *_NUMBERS, *_BYTES))
Leaf = tuple[tuple[PathKey, ...], Any]
Operation = Callable[[Any, list[Any], dict[Any, Any]], None]


def _marked(stack: list[Any]) -> list[Any]:
    """Take what stands above the last mark, and the mark."""
    place = _last_mark(stack)
    found = stack[place + 1 :]
    del stack[place:]
    return found


def _last_mark(stack: list[Any]) -> int:
    place = len(stack) - 1
    while place >= 0 and stack[place] is not _MARK:
        place -= 1
    if place < 0:
        raise IndexError("there is no mark")
    return place


def _take(stack: list[Any], count: int) -> list[Any]:
    if count > len(stack):
        raise IndexError("the stack is empty")
    found = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return found


def _append(target: Any, values: list[Any]) -> None:
    if isinstance(target, Made):
        target.items += enumerate(values, len(target.items))
    else:
        target.extend(values)


def _set(target: Any, values: list[Any]) -> None:
    pairs = list(zip(values[::2], values[1::2], strict=True))
    if isinstance(target, Made):
        target.items += pairs
    else:
        # Keys may be anything; only what can be a key is one.
        for key, value in pairs:
            target[key if isinstance(key, (str, int, float, bytes)) else free_key(key, target)] = value


def _build(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    state = stack.pop()
    if isinstance(stack[-1], Made):
        stack[-1].state = state


def _reduce(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    function, arguments = _take(stack, 2)
    stack.append(Made(function, arguments))


def _new_with_keywords(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    function, arguments, keywords = _take(stack, 3)
    stack.append(Made(function, (arguments, keywords)))


def _stack_global(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    module, name = _take(stack, 2)
    stack.append(Name(f"{module} {name}"))


def _remember(key: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    memo[key] = stack[-1]


def _append_one(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    value = stack.pop()
    _append(stack[-1], [value])


def _append_many(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    values = _marked(stack)
    _append(stack[-1], values)


def _set_one(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    values = _take(stack, 2)
    _set(stack[-1], values)


def _set_many(_: Any, stack: list[Any], memo: dict[Any, Any]) -> None:
    values = _marked(stack)
    _set(stack[-1], values)


def _dict_of(values: list[Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    _set(found, values)
    return found


def _pushes(make: Callable[[], Any]) -> Operation:
    return lambda argument, stack, memo: stack.append(make())


def _collects(make: Callable[[list[Any]], Any]) -> Operation:
    return lambda argument, stack, memo: stack.append(make(_marked(stack)))


def _groups(count: int) -> Operation:
    return lambda argument, stack, memo: stack.append(tuple(_take(stack, count)))


_OPERATIONS: dict[str, Operation] = {
    "MARK": _pushes(lambda: _MARK),
    "NONE": _pushes(lambda: None),
    "NEWTRUE": _pushes(lambda: True),
    "NEWFALSE": _pushes(lambda: False),
    "EMPTY_TUPLE": _pushes(tuple),
    "EMPTY_LIST": _pushes(list),
    "EMPTY_DICT": _pushes(dict),
    "EMPTY_SET": _pushes(list),
    "TUPLE": _collects(tuple),
    "LIST": _collects(list),
    "DICT": _collects(_dict_of),
    "FROZENSET": _collects(list),
    "TUPLE1": _groups(1),
    "TUPLE2": _groups(2),
    "TUPLE3": _groups(3),
    "POP": lambda argument, stack, memo: stack.__delitem__(-1),
    "POP_MARK": lambda argument, stack, memo: stack.__delitem__(slice(_last_mark(stack), None)),
    "DUP": lambda argument, stack, memo: stack.append(stack[-1]),
    "APPEND": _append_one,
    "APPENDS": _append_many,
    "ADDITEMS": _append_many,
    "SETITEM": _set_one,
    "SETITEMS": _set_many,
    "GLOBAL": lambda argument, stack, memo: stack.append(Name(argument)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "BUILD": _build,
    "BINPERSID": lambda argument, stack, memo: stack.append(StorageOf(stack.pop())),
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "PUT": _remember,
    "MEMOIZE": lambda argument, stack, memo: memo.update({len(memo): stack[-1]}),
    "BINGET": lambda argument, stack, memo: stack.append(memo[argument]),
    "LONG_BINGET": lambda argument, stack, memo: stack.append(memo[argument]),
    "GET": lambda argument, stack, memo: stack.append(memo[argument]),
}

_DTYPES = {f"torch {storage}": dtype for dtype, storage in STORAGES.items()}
_UNTYPED = ("torch.storage UntypedStorage", "torch UntypedStorage")
_TENSORS = {"torch._utils _rebuild_tensor_v2": 6, "torch._utils _rebuild_tensor_v3": 7}
_PARAMETERS = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
_OF_TYPE = "torch._tensor _rebuild_from_type_v2"
_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
# Subclasses whose values are those of the tensor inside.
_PLAIN_TYPES = ("torch Tensor", "torch.nn.parameter Parameter", "torch.nn.parameter Buffer")


def plain(value: Any) -> Any:
    """A node as what it stands for: a container, number or text, `TensorAt` or `Unknown`. Not what is in it.

    Raises PtError for a damaged tensor.
    """
    if isinstance(value, StorageOf):
        return Unknown("storage", True)
    if isinstance(value, Name):
        module, _, name = value.text.partition(" ")
        return name if module == "torch" else Unknown(name, False)
    if not isinstance(value, Made):
        return value
    function = value.function.text if isinstance(value.function, Name) else ""
    arguments = value.arguments
    if function in _TENSORS:
        return _tensor(value)
    if function in _PARAMETERS and isinstance(arguments, tuple) and arguments:
        return plain(arguments[0])
    if function == _OF_TYPE and isinstance(arguments, tuple) and len(arguments) == 4:
        if isinstance(arguments[1], Name) and arguments[1].text in _PLAIN_TYPES:
            return plain(Made(arguments[0], arguments[2]))
        return Unknown(name_of(arguments[1]), True)
    if function in ("collections OrderedDict", "collections defaultdict"):
        return _dict_of([part for pair in value.items for part in pair])
    if function == "torch Size" and isinstance(arguments, tuple) and len(arguments) == 1:
        return tuple(arguments[0]) if isinstance(arguments[0], (list, tuple)) else Unknown(function, False)
    if function == "torch device" and isinstance(arguments, tuple):
        return ":".join(str(each) for each in arguments)
    if value.items and holds_all(value):
        # Of a class of its own that is a dictionary or list, as models of transformers return.
        return _dict_of([part for pair in value.items for part in pair])
    if function in _ARRAYS:
        # Its bytes lie in the pickle.
        return Unknown("numpy array", True)
    name = name_of(value.function)
    # One on the device meta has no bytes anywhere.
    return Unknown(name, holds_storage(value) or (name.startswith("_rebuild_") and "tensor" in name))


def _tensor(made: Made) -> TensorAt | Unknown:
    function, arguments = made.function.text, made.arguments
    if not isinstance(arguments, tuple) or len(arguments) < _TENSORS[function]:
        raise PtError("a tensor's description is damaged")
    stored, offset, shape, strides = arguments[:4]
    shape, strides = plain(shape), plain(strides)
    reference = stored.reference if isinstance(stored, StorageOf) else None
    if not isinstance(reference, tuple) or len(reference) != 5 or not isinstance(reference[2], str):
        raise PtError("a tensor's description is damaged")
    if not (_sizes(shape) and _sizes(strides) and _sizes((offset,)) and len(shape) == len(strides)):
        raise PtError("a tensor's description is damaged")
    dtype = _dtype(reference[1], arguments[6] if function.endswith("v3") else None)
    if dtype is None:
        return Unknown(f"tensor of {name_of(reference[1])}", True)
    altered = arguments[_TENSORS[function] :]
    if altered and altered[0]:
        # Conjugated or negated: the values are not those of the storage.
        return Unknown("tensor with a lazy conjugate or sign", True)
    device = reference[3] if isinstance(reference[3], str) else "cpu"
    return TensorAt(dtype, shape, reference[2], offset, strides, device)


def _sizes(value: Any) -> bool:
    sized = isinstance(value, tuple) and len(value) <= _MOST_DIMENSIONS
    return (
        sized
        and all(type(each) is int and 0 <= each < _LARGEST for each in value)
        and (prod(value) < _LARGEST)
    )


def _dtype(kind: Any, stated: Any) -> str | None:
    if not isinstance(kind, Name):
        return None
    if kind.text in _UNTYPED:
        module, _, name = stated.text.partition(" ") if isinstance(stated, Name) else ("", "", "")
        return name if module == "torch" and item_size(name) is not None else None
    return _DTYPES.get(kind.text)


def leaves(value: Any, size: int) -> Iterator[Leaf]:
    """What is in a node that is no container, with the keys that lead there.

    ``size`` is that of the pickle: what has far more nodes than bytes repeats itself without end. Raises
    PtError for such a one.
    """
    count, most = 0, size + _LEAST_LIMIT
    waiting: list[tuple[tuple[PathKey, ...], Any]] = [((), value)]
    while waiting:
        path, node = waiting.pop()
        node = plain(node)
        count += 1
        if count > most or len(path) > _DEEPEST:
            raise PtError("it holds too much, or is nested too deep")
        if isinstance(node, dict):
            keyed = [((*path, key if isinstance(key, int) else str(key)), each) for key, each in node.items()]
            waiting += reversed(keyed)
        elif isinstance(node, (list, tuple)) and not isinstance(node, (TensorAt, Unknown)):
            waiting += reversed([((*path, place), each) for place, each in enumerate(node)])
        else:
            yield path, node
