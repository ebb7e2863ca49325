"""Walking structures in C and in Python: one sketch, the same leaves in the same order, the same bytes."""

from __future__ import annotations

import collections
import collections.abc
import gc
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hotpath.halves import native
from tlcore.hotpath.looking import can_look
from tlcore.layout.structure import flatten

Point = collections.namedtuple("Point", "x y")


@dataclass
class Pair:
    one: Any
    other: Any


class Leaves:
    """The reference: every tensor taken by Python."""

    opens: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.taken: list[tuple[Any, ...]] = []
        self.scalars: list[Any] = []
        self.left_out: list[tuple[Any, str]] = []

    def tensor(self, tensor: torch.Tensor) -> None:
        self.taken.append((tensor.dtype, tuple(tensor.shape), tensor.tolist()))

    def scalar(self, value: Any) -> None:
        self.scalars.append(value)

    def unopened(self, value: Any, reason: str) -> None:
        self.left_out.append((value, reason))

    def first(self, tensor: torch.Tensor) -> bool:
        return True


class Walk:
    """The extension's walk, told what a stager would tell it."""

    opens: frozenset[str] = frozenset()

    def __init__(self, size: int = 1 << 16) -> None:
        native()
        assert can_look()
        self.memory = native().Memory()
        self.store = torch.zeros(size, dtype=torch.uint8)
        self.memory.address, self.memory.size = self.store.data_ptr(), size
        self.specs: list[Any] = []
        self.memories: list[Any] = []
        self.offsets: list[Any] = []
        self.scalars: list[Any] = []
        self.left_out: list[tuple[Any, str]] = []
        self.slow = 0
        self.walker = native().Walker(self.tensor, self.other)
        self.walker.use([], self.specs, self.memories, self.offsets, self.scalars)
        self.walker.fill(self.memory)

    def tensor(self, tensor: torch.Tensor) -> None:
        self.slow += 1
        spec = (tensor.dtype, tuple(tensor.shape))
        if type(tensor) is torch.Tensor and not tensor.is_complex():
            self.walker.know(tensor, spec, tensor.nbytes)
        self.specs.append(spec)
        self.memories.append(None)
        self.offsets.append(tensor.tolist())

    def scalar(self, value: Any) -> None:
        self.scalars.append(value)

    def unopened(self, value: Any, reason: str) -> None:
        self.left_out.append((value, reason))

    def first(self, tensor: torch.Tensor) -> bool:
        return True

    def other(self, value: Any, seen: tuple[int, ...]) -> Hashable:
        return flatten(value, self, seen)

    @property
    def taken(self) -> list[tuple[Any, ...]]:
        return [
            (*spec, place if memory is None else self._read(spec[0], spec[1], place))
            for spec, memory, place in zip(self.specs, self.memories, self.offsets, strict=True)
        ]

    def _read(self, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> Any:
        empty = torch.empty(shape, dtype=dtype)
        return self.store[begin : begin + empty.nbytes].view(dtype).view(shape).tolist()


_TENSORS = st.sampled_from(
    [
        torch.arange(6.0),
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(7),
        torch.tensor([1, -2], dtype=torch.int8),
        torch.tensor([1, 2], dtype=torch.uint8),
        torch.zeros(0, 2),
        torch.tensor([True]),
        torch._neg_view(torch.arange(3.0)),
        torch.arange(3.0),
        torch.tensor([1 + 2j]).conj(),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones((1,) * 6),
    ]
)
_LEAVES = st.one_of(
    _TENSORS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.just(object)
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(0, 3), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(MappingProxyType),
    ),
    max_leaves=20,
)


@settings(max_examples=60)
@given(st.lists(_VALUES, min_size=1, max_size=3))
def test_both_halves_see_the_same(values: list[Any]) -> None:
    walk, leaves = Walk(), Leaves()
    # Twice, since what is seen for the first time takes the long way.
    for value in values * 2:
        assert walk.walker.flatten(value) == flatten(value, leaves)
    assert walk.taken == leaves.taken
    assert list(map(repr, walk.scalars)) == list(map(repr, leaves.scalars))


def test_what_is_known_is_taken_without_python() -> None:
    walk = Walk()
    tensor = torch.arange(4.0)
    for _ in range(3):
        walk.walker.flatten([tensor, (tensor,), {"a": tensor}])
    assert walk.slow == 1 and len(walk.taken) == 9
    assert all(offset % 64 == 0 for offset in walk.offsets[1:])


def test_what_a_batch_has_already_is_not_copied_again_unless_it_was_written_to() -> None:
    walk = Walk()
    tensor = torch.arange(2048.0)
    square, part = tensor.view(32, 64), tensor[:1024]
    for each in (tensor, square, part):
        walk.walker.know(each, (each.dtype, tuple(each.shape)), each.nbytes)
    walk.walker.flatten([tensor, {"a": square}, (tensor,)])
    assert walk.offsets == [0, 0, 0] and walk.memory.bytes == 8192
    # What begins there too, and is shorter.
    walk.walker.flatten([part, part])
    assert walk.offsets[3:] == [8192, 8192]
    held = tensor.tolist()
    tensor[7] = -1
    walk.walker.flatten([tensor, square])
    assert walk.offsets[5:] == [12288, 12288] and walk.slow == 0
    assert [each[2] for each in walk.taken[:4]] == [
        held,
        torch.tensor(held).view(32, 64).tolist(),
        held,
        held[:1024],
    ]
    assert walk.taken[5][2] == tensor.tolist()
    # Memory of an earlier batch is somebody else's.
    walk.walker.use([], walk.specs, walk.memories, walk.offsets, walk.scalars)
    walk.walker.flatten(tensor)
    assert walk.offsets[7:] == [20480]


def test_tensors_without_gaps_alone_are_held_against_copies() -> None:
    walk = Walk()
    square = torch.arange(4096.0).view(64, 64)
    for each in (square, square.T):
        walk.walker.know(each, each.stride(), each.nbytes)
    # As for DLPack, both have one form.
    walk.walker.flatten([square, square.T, square])
    assert walk.offsets == [0, 16384, 0]
    assert walk.store[16384:32768].view(torch.float32).view(64, 64).equal(square.T)


def test_memory_that_is_full_or_missing_is_left_to_python() -> None:
    walk = Walk(size=64)
    tensor = torch.arange(16.0)
    for _ in range(3):
        walk.walker.flatten(tensor)
    assert walk.slow == 2 and walk.memory.bytes == 64
    walk.walker.fill(None)
    walk.walker.flatten(tensor)
    assert walk.slow == 3
    with pytest.raises(TypeError, match="is no Memory"):
        walk.walker.fill(object())


@pytest.mark.parametrize("damaged", [{"bytes": -1}, {"bytes": 1 << 62}, {"size": -5}, {"size": 3}])
def test_memory_that_makes_no_sense_is_not_written_to(damaged: dict[str, int]) -> None:
    walk = Walk()
    walk.walker.flatten(torch.arange(4.0))
    for name, value in damaged.items():
        setattr(walk.memory, name, value)
    walk.walker.flatten(torch.arange(4.0))
    assert walk.slow == 2 and not walk.store.any()


@pytest.mark.parametrize("lies", [0, 15, 17, -16, 1 << 62])
def test_a_size_that_is_not_the_tensor_s_is_not_believed(lies: int) -> None:
    walk = Walk()
    walk.walker.know(torch.arange(4.0), "spec", lies)
    walk.walker.flatten(torch.arange(4.0))
    assert walk.slow == 1


@pytest.mark.parametrize("dtype", ["uint4", "int2", "uint1"])
def test_dtypes_that_dlpack_takes_for_others_are_told_apart(dtype: str) -> None:
    small = getattr(torch, dtype, None)
    if small is None:
        pytest.skip(f"this torch has no {dtype}")
    whole = torch.uint8 if dtype.startswith("u") else torch.int8
    for first, second in ((whole, small), (small, whole)):
        walk = Walk()
        seen: list[torch.Tensor] = []
        walker = native().Walker(seen.append, walk.other)
        walker.use([], walk.specs, walk.memories, walk.offsets, walk.scalars)
        walker.fill(walk.memory)
        walker.know(torch.empty(4, dtype=first), first, 4)
        walker.flatten([torch.empty(4, dtype=first), torch.empty(4, dtype=second)])
        assert walk.specs == [first] and [tensor.dtype for tensor in seen] == [second]


@pytest.mark.parametrize("part", [slice(None), slice(5, None)], ids=["whole", "a part"])
def test_freed_memory_is_never_read(part: slice) -> None:
    walk = Walk()
    seen: list[torch.Tensor] = []
    walker = native().Walker(seen.append, walk.other)
    walker.use([], walk.specs, walk.memories, walk.offsets, walk.scalars)
    walker.fill(walk.memory)
    whole = torch.arange(10.0)
    freed = whole[part]
    walker.know(freed, "spec", freed.nbytes)
    walker.flatten(freed)
    assert walk.specs == ["spec"] and not seen
    whole.untyped_storage().resize_(0)
    walker.flatten(freed)
    assert walk.specs == ["spec"] and seen[0] is freed


def test_a_copy_made_at_the_first_write_keeps_both_sides_as_they_are() -> None:
    walk = Walk()
    first = torch.arange(3.0)
    second = torch._lazy_clone(first)
    walk.walker.flatten([first, first])
    walk.walker.flatten(second)
    second += 1
    assert first.tolist() == [0, 1, 2] and second.tolist() == [1, 2, 3]
    assert walk.taken[2] == (torch.float32, (3,), [0, 1, 2])


def test_containers_may_change_while_python_looks_at_what_is_in_them() -> None:
    walk = Walk()
    value: list[Any] = []

    class Empty(collections.abc.Mapping[str, Any]):
        """A mapping's own code is what is still run."""

        def __init__(self, victim: Any) -> None:
            self.victim = victim

        def __getitem__(self, key: str) -> Any:
            raise KeyError(key)

        def __len__(self) -> int:
            return 0

        def __iter__(self) -> Any:
            self.victim.clear()
            return iter(())

    value += [1, Empty(value), 2, 3, {"a": 1}]
    sketch = walk.walker.flatten(value)
    assert sketch[0] == "list" and len(sketch[1]) == 2
    table: dict[str, Any] = {}

    table |= {"a": Empty(table), "b": 1}
    assert walk.walker.flatten(table)[1] == ("a", "b")


def test_a_cycle_and_the_deepest_nesting_end() -> None:
    walk, leaves = Walk(), Leaves()
    cycle: list[Any] = [1]
    cycle.append({"again": (cycle,)})
    deep: Any = torch.arange(2.0)
    for _ in range(70):
        deep = [deep]
    for value in (cycle, deep):
        assert walk.walker.flatten(value) == flatten(value, leaves)


def test_what_python_raises_comes_out_and_nothing_is_lost() -> None:
    walk = Walk()

    def fails(*_: object) -> None:
        raise LookupError("no")

    walker = native().Walker(fails, fails)
    with pytest.raises(RuntimeError, match="use"):
        walker.flatten(1)
    walker.use([], [], [], [], walk.scalars)
    for value in (torch.ones(1), [(1, {"a": torch.ones(1)})], object(), [{2: 3}]):
        with pytest.raises(LookupError, match="no"):
            walker.flatten(value)
    assert walk.scalars == [1]


def test_a_walker_in_a_circle_is_collected() -> None:
    class Owner:
        def __init__(self) -> None:
            self.walker = native().Walker(self.long_way, self.long_way)
            self.walker.use([], [], [], [], [self])
            self.walker.know(torch.ones(3), self, 12)

        def long_way(self, *_: object) -> None: ...

    gone = weakref.ref(Owner())
    gc.collect()
    assert gone() is None
