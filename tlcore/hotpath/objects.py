"""Looking into objects for tensors, without running any of their code.

Only what an object holds is read: its ``__dict__``, its slots, and what the containers of Python's own hold.
No property, ``__getattr__``, ``__iter__`` or ``__eq__`` of a user's class is called, no iterator is consumed.
Two kinds of classes say themselves what they hold, and are asked: mappings, and registered pytree nodes.
"""

from __future__ import annotations

import collections
import collections.abc
import contextvars
import dataclasses
import enum
import functools
import gc
import io
import itertools
import struct
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import nn
from torch.utils import _pytree

from .intercept import StandIn

# What a class's instances are.
PLAIN = "plain"  # holds no tensor that could be looked for
SCALAR = "scalar"
TENSOR = "tensor"
ARRAY = "array"
NUMBER = "number"
SEQUENCE = "sequence"
SET = "set"
MAPPING = "mapping"
DATACLASS = "dataclass"
PYTREE = "pytree"
OBJECT = "object"
CACHE = "cache"
MODULE = "module"
ITERATOR = "iterator"
STORAGE = "storage"
FUTURE = "future"
METHOD = "method"
# Its class, of C, keeps what it holds where only the garbage collector looks.
HIDDEN = "hidden by its class"
# What is counted where it is met, and not looked into.
UNOPENED = (MODULE, ITERATOR, STORAGE, FUTURE)

# Values that are looked at, at most, to find out whether an attribute holds a tensor at all.
MOST_VALUES = 10_000
_SCALARS = (bool, int, float, str)
_HEAP_TYPE, _COLLECTED = 1 << 9, 1 << 14
_OWN = (types.GetSetDescriptorType, types.MemberDescriptorType)
_RAW: tuple[Any, ...] = (tuple, list, collections.deque, set, frozenset)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# Iterators over what is no tensor.
_HARMLESS = (
    *(type(iter(each)) for each in (range(0), range(1 << 80), "", "\u0100", b"", bytearray())),
    *(itertools.count, io.IOBase, type(iter(np.nditer(np.zeros(1))))),
)
_CLOSED = (
    *(type, enum.Enum, types.ModuleType, types.CodeType),
    *(types.FrameType, types.TracebackType, weakref.ref, weakref.ProxyType, weakref.CallableProxyType),
)
_STORAGES = (torch.UntypedStorage, torch.TypedStorage)
_STOPPED = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


class Kind(NamedTuple):
    """How instances of a class are read: what they are, ``__dict__`` and slots, a dataclass's fields.

    ``hides``: whether a base of C may keep more, where only the garbage collector looks.
    """

    what: str
    own: Any = None
    slots: tuple[tuple[str, Any], ...] = ()
    fields: tuple[str, ...] = ()
    hides: bool = False

    def attributes(self, value: Any) -> dict[str, Any]:
        """What the instance itself holds, by name."""
        found: dict[str, Any] = {}
        for name, slot in self.slots:
            try:
                found[name] = slot.__get__(value, type(value))
            except AttributeError:
                continue
        if self.own is not None:
            own = self.own.__get__(value, type(value))
            if type(own) is dict:
                # A copy, since another thread may add to it.
                found |= {str(name): each for name, each in own.copy().items()}
        return found


_kinds: weakref.WeakKeyDictionary[type, Kind] = weakref.WeakKeyDictionary()


def kind_of(cls: type) -> Kind:
    """How instances of a class are read."""
    kind = _kinds.get(cls)
    if kind is None:
        kind = _kinds[cls] = _kind(cls)
    return kind


def _kind(cls: type) -> Kind:
    mro = type.mro(cls)
    what = _builtin(cls)
    if what in (PLAIN, TENSOR, NUMBER, METHOD, *UNOPENED):
        return Kind(what)
    own = next((d for each in mro if type(d := vars(each).get("__dict__")) in _OWN), None)
    slots = tuple(
        (name, member)
        for each in reversed(mro)
        for name, member in vars(each).items()
        if type(member) is types.MemberDescriptorType
        and (each.__flags__ & _HEAP_TYPE or name[:2] != "__")
        and name != "__dict__"
    )
    if what:
        return Kind(what, own, slots)
    if _is_cache(mro):
        return Kind(CACHE, own, slots)
    if isinstance(vars_of(cls, "__dataclass_fields__"), dict):
        return Kind(DATACLASS, own, slots, tuple(each.name for each in dataclasses.fields(cls)))
    if own is not None or slots:
        return Kind(OBJECT, own, slots, hides=any(map(_hides, mro)))
    if cls in _pytree.SUPPORTED_NODES:
        return Kind(PYTREE)
    if issubclass(cls, collections.abc.Iterator):
        return Kind(ITERATOR)
    if issubclass(cls, collections.abc.Sequence):
        return Kind(SEQUENCE)
    return Kind(HIDDEN if cls.__flags__ & _COLLECTED else PLAIN)


def _hides(cls: type) -> bool:
    """Whether instances have more room than for slots, attributes and weak references, which is collected."""
    if cls.__base__ is None or not cls.__flags__ & _COLLECTED:
        return False
    slots = sum(type(each) is types.MemberDescriptorType for each in vars(cls).values())
    return cls.__basicsize__ > cls.__base__.__basicsize__ + (slots + 2) * struct.calcsize("P")


def _builtin(cls: type) -> str | None:
    """What instances of a class are that has a base of Python's own, torch's or numpy's; None for others."""
    table: tuple[tuple[Any, str], ...] = (
        (torch.Tensor, TENSOR), (_SCALARS, SCALAR), (np.ndarray, ARRAY), (np.generic, NUMBER),
        # What stands for a module's own forward is that, a method of a module.
        (StandIn, PLAIN), ((*_CLOSED, *_HARMLESS, memoryview, range), PLAIN),
        ((tuple, list, collections.deque, *_VIEWS), SEQUENCE), ((set, frozenset), SET), (dict, MAPPING),
        (nn.Module, MODULE), (_STOPPED, ITERATOR), (types.FunctionType, OBJECT),
        # What else holds a tensor is a variable of a context, or has attributes beside its bytes.
        ((contextvars.ContextVar, bytes, bytearray), OBJECT),
        ((types.MethodType, types.BuiltinFunctionType), METHOD), (_STORAGES, STORAGE),
        (torch._C.Future, FUTURE),
    )  # fmt: skip
    for bases, what in table:
        if issubclass(cls, bases):
            return what
    # A class without Python's own base says only by protocol that it is one.
    if issubclass(cls, collections.abc.Mapping):
        return MAPPING
    if issubclass(cls, collections.abc.Iterator) and not cls.__flags__ & _HEAP_TYPE:
        return ITERATOR
    return None


def vars_of(cls: type, name: str) -> Any:
    """An attribute of a class as it stands in its or a base's namespace, without running any code."""
    return next((vars(each)[name] for each in type.mro(cls) if name in vars(each)), None)


def _is_cache(mro: Iterable[type]) -> bool:
    """Whether a class is one of transformers' key/value or state caches, or a layer of one."""
    for each in mro:
        module, name = str(each.__module__), each.__name__
        if module.partition(".")[0] == "transformers" and (
            name.endswith("Cache")
            or (module.endswith(".cache_utils") and name.endswith(("Layer", "LayerMixin")))
        ):
            return True
    return False


def class_name(value: object) -> str:
    """``package.module.Class`` of a value."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def items_of(value: Any) -> list[Any]:
    """The items of a `SEQUENCE` or `SET`, in its own order."""
    for base in _RAW:
        if issubclass(type(value), base):
            return list(base.__iter__(value))
    return list(value)


def pairs_of(value: Any, kind: Kind) -> list[tuple[Any, Any]]:
    """The keys and values of a `MAPPING`."""
    cls = type(value)
    if issubclass(cls, collections.OrderedDict):
        return list(collections.OrderedDict.items(value))
    if issubclass(cls, dict):
        return list(dict.items(value))
    if issubclass(cls, collections.UserDict):
        data = kind.attributes(value).get("data")
        if issubclass(type(data), dict):
            return pairs_of(data, kind_of(type(data)))
    mapping: Mapping[Any, Any] = value
    return list(mapping.items())


def fields_of(value: Any, kind: Kind) -> dict[str, Any]:
    """The fields of a `DATACLASS`; those that stand only in the class as they stand there."""
    held = kind.attributes(value)
    found: dict[str, Any] = {}
    for name in kind.fields:
        if name in held:
            found[name] = held[name]
        else:
            default = vars_of(type(value), name)
            found[name] = None if hasattr(type(default), "__get__") else default
    return found


def attributes_of(value: Any, kind: Kind) -> dict[str, Any]:
    """What an `OBJECT` or `CACHE` holds; of a function, what its closure and its default arguments hold."""
    if issubclass(type(value), types.FunctionType):
        found = _defaults_of(value)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            try:
                found[name] = cell.cell_contents
            except ValueError:
                continue
        # Functions close over modules all the time, and hand none on.
        return {name: each for name, each in found.items() if kind_of(type(each)).what != MODULE}
    held = kind.attributes(value)
    if type(value) is contextvars.ContextVar:
        return {"value": value.get(None)}
    if issubclass(type(value), functools.partial):
        return {name: each for name, each in held.items() if kind_of(type(each)).what != MODULE}
    return held


def hidden_in(value: Any, kind: Kind) -> list[Any]:
    """What an object refers to beside its attributes and modules, which are at hand everywhere."""
    shown = {id(each) for each in kind.attributes(value).values()}
    if kind.own is not None:
        shown.add(id(kind.own.__get__(value, type(value))))
    found = [each for each in gc.get_referents(value) if id(each) not in shown]
    return [each for each in found if kind_of(type(each)).what not in (PLAIN, MODULE)]


def _defaults_of(function: types.FunctionType) -> dict[str, Any]:
    defaults, code = function.__defaults__ or (), function.__code__
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return {**dict(zip(names, defaults, strict=False)), **(function.__kwdefaults__ or {})}


def nodes_of(value: Any) -> list[tuple[int | str, Any]]:
    """The children of a `PYTREE` node, by the keys that its class names, or by number."""
    node = _pytree.SUPPORTED_NODES[type(value)]
    if node.flatten_with_keys_fn is not None:
        pairs, _ = node.flatten_with_keys_fn(value)
        return [(_key(key), child) for key, child in pairs]
    children, _ = node.flatten_fn(value)
    return list(enumerate(children))


def _key(key: Any) -> int | str:
    for name in ("idx", "key", "name"):
        found = getattr(key, name, None)
        if isinstance(found, (int, str)):
            return found
    return str(key)


SIMPLE = frozenset((*_SCALARS, type(None), bytes, complex, type, torch.dtype, torch.device, types.MethodType))


def key_label(key: Any, place: int) -> str:
    """How a mapping's key is called in names: as it is written, or its class and place in the mapping."""
    cls = type(key)
    if cls is str or issubclass(cls, (str, bytes, enum.Enum)) or cls in SIMPLE:
        return str(key)
    if cls in (tuple, frozenset, torch.Size) and all(type(each) in SIMPLE for each in key):
        return str(key)
    return str(key.item()) if issubclass(cls, np.generic) else f"{cls.__name__}_{place}"


def plain_scalar(value: Any) -> Any:
    """The number or text that an instance of a subclass is, without running its code."""
    cls = type(value)
    if issubclass(cls, str):
        return str.__str__(value)
    return int.__pos__(value) if issubclass(cls, int) else float.__pos__(value)


def plain_array(array: Any) -> Any:
    """A numpy array's own data, without what its class adds."""
    return np.ndarray.view(array, np.ndarray)


def tensor_of(plain: Any) -> torch.Tensor | str:
    """A plain numpy array as a tensor over the same memory where that can be; else why it is none."""
    try:
        if not plain.dtype.isnative:
            plain = plain.astype(plain.dtype.newbyteorder("="))
        if not plain.flags.writeable or any(
            stride < 0 or stride % plain.itemsize for stride in plain.strides
        ):
            plain = plain.copy()
        return torch.from_numpy(plain)
    except (TypeError, ValueError, RuntimeError):
        return f"unsupported numpy dtype {plain.dtype}"


def in_order(items: Iterable[Any]) -> list[Any]:
    """The items of a set, ordered by what they hold, since a set's own order changes from run to run."""
    found = list(items)
    try:
        return sorted(found, key=_content)
    except Exception:
        # Such as a tensor whose memory was freed; what is wrong with it is told where it is captured.
        return found


def _content(value: Any, depth: int = 8) -> tuple[Any, ...]:
    """A key to sort by: the class, then what the value holds."""
    cls = f"{type(value).__module__}.{type(value).__qualname__}"
    if issubclass(type(value), torch.Tensor):
        first = value.detach().reshape(-1)[:_COMPARED].cpu().tolist()
        return (cls, str(value.dtype), tuple(value.shape), [_number(each) for each in first], _digest(value))
    if issubclass(type(value), (tuple, frozenset)):
        items = value if issubclass(type(value), tuple) else in_order(value)
        return (cls, [_content(each, depth - 1) for each in items] if depth else [])
    if issubclass(type(value), (*_SCALARS, bytes)):
        return (cls, _number(value) if issubclass(type(value), float) else value)
    if issubclass(type(value), enum.Enum):
        return (cls, value.name)
    kind = kind_of(type(value))
    if kind.what in (DATACLASS, OBJECT) and depth:
        held = fields_of(value, kind) if kind.what == DATACLASS else attributes_of(value, kind)
        return (cls, [(name, _content(each, depth - 1)) for name, each in held.items()])
    return (cls, [])


_COMPARED = 16


def _number(value: Any) -> tuple[Any, ...]:
    if isinstance(value, complex):
        return (*_number(value.real), *_number(value.imag))
    return (value != value, 0.0 if value != value else value)


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_hexdigest(plain.view(torch.uint8).numpy().tobytes())
