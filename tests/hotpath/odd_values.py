"""What most modules do not hand on: structures and tensors that a fast path might get wrong."""

from __future__ import annotations

import collections
import dataclasses
import enum
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

Make = Callable[[torch.Tensor], Any]
MODELS: dict[str, Callable[[], nn.Module]] = {}


class Returns(nn.Module):
    """A module that makes something of its argument."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Any, *more: Any, **named: Any) -> Any:
        return self.make(x)


class HandsOn(nn.Module):
    """Takes anything, gives it back."""

    def forward(self, *given: Any, **named: Any) -> Any:
        return named if named else given[0] if len(given) == 1 else given


class Chain(nn.Module):
    """What is made of the input is handed on, in three forms of call."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.makes, self.takes = Returns(make), HandsOn()

    def forward(self, x: torch.Tensor) -> Any:
        made = self.makes(x)
        self.takes(made)
        self.takes(made, x, made)
        self.takes(x, key=made, other=x)
        return x * 2


def made(make: Make) -> Make:
    """Register what a module returns under the function's name."""
    MODELS[make.__name__.strip("_")] = lambda: Chain(make)
    return make


class Pair(NamedTuple):
    one: Any
    other: Any = None


@dataclasses.dataclass
class Record:
    tensor: torch.Tensor
    number: int = 3
    inner: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    tensors: tuple[torch.Tensor, ...]


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Word(str):
    """A text of its own kind."""


class Marked(torch.Tensor):
    """A subclass whose functions give the subclass."""


class Wrapper(torch.Tensor):
    """One without memory of its own."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        own: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        own.held = inner
        return own

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        opened = [each.held if isinstance(each, Wrapper) else each for each in args]
        return func(*opened, **(kwargs or {}))


@made
def dataclasses_in_dataclasses(x: torch.Tensor) -> Any:
    return Record(x, inner=Record(x + 1, inner=Frozen((x, x[0]))))


@made
def named_tuples(x: torch.Tensor) -> Any:
    return Pair(Pair(x), [Pair(None, x)])


@made
def model_outputs(x: torch.Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=(x, x + 1))


@made
def keys_of_all_kinds(x: torch.Tensor) -> Any:
    inner = {1: x, (2, 3): x + 1, None: x, False: x + 2, 1.5: x, Colour.RED: x, Level.LOW: x, b"b": x}
    return {0: inner, Word("word"): x, "": x, "a/b": x, "..": x, "\u00e9\n": x, "1": x, -1: {"-1": x}}


@made
def lone_surrogates(x: torch.Tensor) -> Any:
    return {"\ud800": x, "a\ud800b": "\udfff"}


@made
def float_keys(x: torch.Tensor) -> Any:
    return {float("nan"): x, float("inf"): x, -0.0: x, 2**70: x, 1e300: x}


@made
def tensors_as_keys(x: torch.Tensor) -> Any:
    return {x: x, x + 1: 1}


@made
def mappings(x: torch.Tensor) -> Any:
    ordered = collections.OrderedDict(b=x, a=x + 1)
    more = types.MappingProxyType({"x": x}), collections.ChainMap({"x": x})
    return [ordered, collections.UserDict(x=x), *more]


@made
def sequences(x: torch.Tensor) -> Any:
    return [collections.deque([x]), collections.UserList([x]), {x}, frozenset([x]), range(3), torch.Size([2])]


@made
def scalars(x: torch.Tensor) -> Any:
    numbers = (True, 2**70, -(2**70), float("nan"), -0.0, float("-inf"), 1j, np.float32(1.5), np.int8(3))
    others = Colour.RED, Level.LOW, Word("w"), b"bytes", ..., None, torch.float32, torch.device("cpu")
    return (*numbers, *others)


@made
def numpy_arrays(x: torch.Tensor) -> Any:
    array = x.numpy(force=True)
    return {"same": array, "turned": array.T, "object": np.array([None, x], object), "0": np.zeros((0, 3))}


@made
def subclasses(x: torch.Tensor) -> Any:
    return x.as_subclass(Marked), [nn.Parameter(x), nn.Buffer(x)]


@made
def wrappers_without_memory(x: torch.Tensor) -> Any:
    return Wrapper(x), x


@made
def sparse(x: torch.Tensor) -> Any:
    return x.to_sparse(), x.to_sparse_csr(), x


@made
def quantised(x: torch.Tensor) -> Any:
    channel = torch.quantize_per_channel(x, torch.ones(2), torch.zeros(2), 0, torch.qint8)
    return torch.quantize_per_tensor(x, 0.5, 1, torch.quint8), channel, x


@made
def nested_tensors(x: torch.Tensor) -> Any:
    return torch.nested.nested_tensor([x, x[:1]]), torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)


@made
def without_data(x: torch.Tensor) -> Any:
    return x.to("meta"), {"meta": torch.empty(3, 4, device="meta")}, x


@made
def fake_tensors(x: torch.Tensor) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3, 4)


@made
def mkldnn(x: torch.Tensor) -> Any:
    return x.to_mkldnn(), x


@made
def complex_views(x: torch.Tensor) -> Any:
    number = torch.complex(x, x + 1)
    views = number.conj(), number.real, number.imag, number.conj().imag, number.conj().real, number.mH
    return (*views, number.to(torch.complex128), number.to(torch.complex32), torch.view_as_real(number))


@made
def negative_views(x: torch.Tensor) -> Any:
    turned = torch._neg_view(x.contiguous())
    views = turned[0], turned.view(-1), -turned, torch._neg_view(turned), turned.T
    return turned, views, nn.Parameter(turned)


@made
def eighths_of_words(x: torch.Tensor) -> Any:
    names = "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"
    scales = (x + 1).view(torch.uint8).view(torch.float8_e8m0fnu)
    return [x.to(getattr(torch, name)) for name in names], scales


@made
def parts_of_bytes(x: torch.Tensor) -> Any:
    raw = (x * 3).to(torch.uint8).contiguous()
    names = "float4_e2m1fn_x2", "uint4", "int4", "uint1", "uint2", "int7", "bits8", "bits4x2", "quint4x2"
    found: dict[str, Any] = {"raw": raw}
    for name in names:
        with suppress(Exception):
            found[name] = raw.view(getattr(torch, name))
    return found


@made
def wide_integers(x: torch.Tensor) -> Any:
    kinds = torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.bool, torch.float64, torch.float16
    return {str(kind): x.abs().to(kind) for kind in kinds}


@made
def nothing_of_much(x: torch.Tensor) -> Any:
    return torch.empty(0, 2**40), torch.empty(2**20, 0, 2**20), x[:, :0], torch.empty(0).expand(7, 0)


@made
def huge_strides(x: torch.Tensor) -> Any:
    flat = x.reshape(-1).clone()
    far = flat.as_strided((1, 3), (2**40, 1)), flat.as_strided((1,), (2**62,))
    return far, flat[::5], flat.as_strided((3, 2), (0, 1))


@made
def overlapping(x: torch.Tensor) -> Any:
    flat = x.reshape(-1).clone()
    return flat.unfold(0, 3, 1), flat.as_strided((4, 3), (1, 1)), x[:1].expand(500, 3), x.sum().expand(2, 2)


@made
def odd_memory(x: torch.Tensor) -> Any:
    raw = bytearray(range(64))
    crooked = torch.frombuffer(raw, dtype=torch.float32, offset=1, count=5)
    return torch.frombuffer(raw, dtype=torch.uint8, offset=3), crooked


@made
def copies_made_at_the_first_write(x: torch.Tensor) -> Any:
    source = x.clone()
    lazy = torch._lazy_clone(source)
    return source, lazy, lazy[0]


@made
def freed_storages(x: torch.Tensor) -> Any:
    freed, shrunk = x.clone(), x.clone()
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(8)
    return freed, x


@made
def holding_itself(x: torch.Tensor) -> Any:
    ring: list[Any] = [x]
    ring.append({"ring": ring, "pair": (ring, x)})
    return ring


@made
def nested_deeply(x: torch.Tensor) -> Any:
    found: Any = x
    for depth in range(300):
        found = [found] if depth % 2 else {"k": found}
    return found


@made
def many_leaves(x: torch.Tensor) -> Any:
    return [(x, number) for number in range(700)]


@made
def objects(x: torch.Tensor) -> Any:
    return types.SimpleNamespace(x=x), nn.Linear(2, 2), lambda: x, torch.Generator(), iter([x]), object


@made
def generators(x: torch.Tensor) -> Any:
    return (x + number for number in range(3))


@made
def gradients_of_all_kinds(x: torch.Tensor) -> Any:
    leaf = x.clone().requires_grad_() if not torch.is_inference_mode_enabled() else x
    result = leaf * 2
    if result.requires_grad:
        torch.autograd.backward(result.sum())
    return leaf, result, leaf.grad, result.detach(), leaf.data


@made
def packed(x: torch.Tensor) -> Any:
    return nn.utils.rnn.pack_sequence([x, x[:1]])


class Surprising(dict[str, Any]):
    """A mapping that runs code when it is looked at."""

    looked = 0

    def __iter__(self) -> Iterator[str]:
        Surprising.looked += 1
        return super().__iter__()

    def items(self) -> Any:
        Surprising.looked += 1
        return super().items()


@made
def mappings_that_run_code(x: torch.Tensor) -> Any:
    return Surprising(a=x, b=Surprising(c=x))


class Hostile:
    """An object whose attributes raise."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__dict__"):
            raise RuntimeError("no")
        return super().__getattribute__(name)


@made
def objects_that_raise(x: torch.Tensor) -> Any:
    return [x, Hostile(), x + 1]
