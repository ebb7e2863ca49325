"""Where the inputs of an operator come from: earlier results, arguments, parameters, or plain values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from ..calls import Operand
from .shared_memory import overlap, storage_of

_DEEPEST, _MOST, _LONGEST = 3, 64, 80
_ref = weakref.ref
_ATOMS = frozenset((type(None), bool, int, float, str))
_PLAIN = frozenset((type(None), bool, int, str, type(Ellipsis), torch.dtype, torch.device))
# Said of a tensor that was written since it was called so, and of memory that no operator has written.
_CHANGED, _NOT_WRITTEN = "changed", "<not written yet>"
# Tensors within arguments and results are looked for up to here.
_MOST_PARTS = 4096


class _Held:
    """A module, and its parameters and buffers as operands."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.parameters: dict[str, Operand] = {}
        self.buffers: dict[str, Operand] = {}


class Operands:
    """Remembers, within a step, which tensor object is which, without keeping any of them alive."""

    # Stands for an argument that is looked at each time.
    ASK: Final = object()

    def __init__(self) -> None:
        # By the object's id: it, what it is, and how often it had been changed in place; -1: not counted.
        # The extension looks at both tables.
        self.known: dict[int, tuple[weakref.ref[torch.Tensor], Operand, int]] = {}
        # Memory that nobody has written yet holds anything.
        self.raw: dict[int, weakref.ref[torch.Tensor]] = {}
        self._models: list[nn.Module] = []
        # The one that was asked for last.
        self.model: nn.Module | None = None
        # Parameters and buffers in `known` by their storage, made when the step writes to anything first.
        self._of_model: dict[int | None, list[int]] | None = None
        # The modules of each model, with what their parameters and buffers are called.
        self._held: dict[int, list[_Held]] = {}

    def begin_step(self, other_modules: bool = True) -> None:
        """Forget the step before; in a model there may be ``other_modules`` than then."""
        self.known.clear()
        self.raw.clear()
        self._models = []
        self._of_model = None
        self.model = None
        if other_modules:
            self._held.clear()

    def use(self, model: nn.Module) -> None:
        """Know the parameters and buffers of a model, as they are when the step asks first."""
        self.model = model
        if any(each is model for each in self._models):
            return
        self._models.append(model)
        self._of_model = None
        all_held = self._held.get(id(model))
        if all_held is None:
            all_held = self._held[id(model)] = [_Held(*each) for each in model.named_modules()]
        known = self.known
        for held in all_held:
            for kind, tensors, operands in (
                ("parameter", held.module._parameters, held.parameters),
                ("buffer", held.module._buffers, held.buffers),
            ):
                for key, tensor in tensors.items():
                    # One that several share goes by its first name.
                    if tensor is not None and id(tensor) not in known:
                        operand = operands.get(key)
                        if operand is None:
                            operand = operands[key] = (kind, f"{held.name}.{key}" if held.name else key)
                        self.note_one(tensor, operand)

    def note(self, value: Any, place: str, again: bool = True) -> None:
        """Each tensor in a value is from now on what stands at a place; where known, only ``again``."""
        if again and isinstance(value, torch.Tensor):
            self.note_one(value, ("from", place))
            return
        for path, tensor in parts_of(value):
            if again or self._found(tensor) is None:
                self.note_one(tensor, ("from", place + path))

    def wrote(self, tensors: Iterable[torch.Tensor], alone: bool = False) -> None:
        """An operator has written to tensors: they, and what shows the same memory, are not what they were.

        They have no name until they get another one. ``alone``, they show something else, which is as it was.
        """
        for tensor in tensors:
            self.known.pop(id(tensor), None)
            if not alone:
                for key in self._sharing(tensor):
                    held, operand, _ = self.known[key]
                    other = held()
                    if other is not None and operand[-1] != _CHANGED and overlap(tensor, other):
                        self.known[key] = held, (*operand, _CHANGED), -1

    def _sharing(self, tensor: torch.Tensor) -> list[int]:
        """What is known that may show the memory of a tensor. Forgets what is no more."""
        known = self.known
        if self._of_model is None:
            self._of_model = {}
            for key, (held, operand, _) in known.items():
                if operand[0] != "from":
                    self._of_model.setdefault(storage_of(held()), []).append(key)
        storage = storage_of(tensor)
        found = [key for key in self._of_model.get(storage, ()) if key in known]
        for key, (held, operand, _) in list(known.items()):
            if operand[0] == "from":
                other = held()
                if other is None:
                    del known[key]
                elif storage_of(other) == storage:
                    found.append(key)
        return found

    def unheard(self) -> None:
        """Code has run that nobody heard: results of which changes are not counted may be others now."""
        known = self.known
        for key in [key for key, each in known.items() if each[2] < 0 and each[1][0] == "from"]:
            del known[key]
        self.raw.clear()

    def knows_all(self, value: Any) -> bool:
        """Whether a value certainly has no tensor that is not known; the extension has a twin."""
        if type(value) is dict:
            return all(map(self._knows_pair, value.values()))
        return all(map(self._knows_pair, value)) if type(value) is tuple else self._knows(value)

    def _knows_pair(self, value: Any) -> bool:
        return all(map(self._knows, value)) if type(value) is tuple else self._knows(value)

    def _knows(self, value: Any) -> bool:
        entry = self.known.get(id(value))
        return type(value) in _ATOMS if entry is None else entry[0]() is value

    def note_one(self, tensor: torch.Tensor, operand: Operand) -> None:
        """A tensor is from now on this operand."""
        version = -1 if tensor.is_inference() else tensor._version
        self.known[id(tensor)] = _ref(tensor), operand, version

    def _found(self, tensor: torch.Tensor) -> tuple[Operand, int] | None:
        entry = self.known.get(id(tensor))
        return entry[1:] if entry is not None and entry[0]() is tensor else None

    def of(self, value: Any, depth: int = 0) -> Operand:
        """What an argument of an operator is, in words that are the same in each step."""
        if isinstance(value, torch.Tensor):
            found = self._found(value)
            if found is None:
                # What is read of memory that nobody was heard to write was written by something else.
                return "unknown", f"{str(value.dtype).removeprefix('torch.')}{_shape_of(value)}"
            operand, version = found
            changed = version >= 0 and version != _version(value)
            return (*operand, _CHANGED) if changed else operand
        if isinstance(value, (tuple, list)) and depth < _DEEPEST:
            return "items", tuple([self.of(each, depth + 1) for each in value[:_MOST]])
        if value is None or isinstance(value, (bool, int, float, str)):
            return "value", repr(value)[:_LONGEST]
        if isinstance(value, (torch.dtype, torch.device, slice, complex, type(Ellipsis))):
            return "value", str(value)[:_LONGEST]
        return "value", f"<{type(value).__name__}>"

    def of_written(self, value: Any) -> Operand:
        """The same of an argument that the operator writes to: what was there before may not matter."""
        if isinstance(value, torch.Tensor) and self.is_raw(value) and self._found(value) is None:
            return "value", _NOT_WRITTEN
        return self.of(value)

    def are_still(self, values: Sequence[Any], before: Sequence[Any], operands: Sequence[Operand]) -> bool:
        """Whether arguments are the same operands as once, when the plain ones among them were ``before``."""
        if len(values) != len(before):
            return False
        known, ask = self.known, self.ASK
        # Shorter or longer than ``before`` they never are; asking costs here.
        for value, old, operand in zip(values, before, operands):  # noqa: B905
            if old is ask:
                entry = known.get(id(value))
                same = entry is not None and entry[0]() is value and entry[1] == operand
                if same and entry is not None and (entry[2] < 0 or entry[2] == value._version):
                    continue
                if self.of(value) != operand:
                    return False
            elif not _is_same(value, old):
                return False
        return True

    def same(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """A tensor shows what another one holds."""
        found = self._found(other)
        if found is not None:
            self.note_one(tensor, found[0])
        if self.is_raw(other):
            self.mark_raw(tensor)

    def mark_raw(self, tensor: torch.Tensor) -> None:
        """What it holds is not written yet."""
        self.raw[id(tensor)] = weakref.ref(tensor)

    def is_raw(self, tensor: torch.Tensor) -> bool:
        """Whether what it holds may not all be written yet."""
        entry = self.raw.get(id(tensor))
        return entry is not None and entry() is tensor

    def written(self, tensor: torch.Tensor) -> None:
        """All of it is written now."""
        self.raw.pop(id(tensor), None)

    def shows_raw(self, tensor: torch.Tensor, args: tuple[Any, ...]) -> bool:
        """Whether a result shows memory that may not all be written yet."""
        if not self.raw:
            return False
        raw = [each for _, each in parts_of(args) if self.is_raw(each)]
        storage = storage_of(tensor) or -1
        return any(each is tensor or storage_of(each) == storage for each in raw)


def as_plain(value: Any, depth: int = 0) -> Any:
    """A value itself where any that is equal, with equal types, is the same operand; else ASK."""
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        # Zeros differ in their sign, and what is no number in all.
        return value if value < 0 or value > 0 else Operands.ASK
    parts: tuple[Any, ...] | None = value if type(value) is tuple and len(value) <= _MOST else None
    if type(value) is slice:
        parts = value.start, value.stop, value.step
    if parts is None or depth >= _DEEPEST:
        return Operands.ASK
    asks = any(as_plain(each, depth + 1) is Operands.ASK for each in parts)
    return Operands.ASK if asks else value


def _is_same(value: Any, old: Any) -> bool:
    """Whether plain values are the same: 1, 1.0 and True are equal."""
    if type(value) is not type(old):
        return False
    if type(value) is tuple:
        return len(value) == len(old) and all(map(_is_same, value, old))
    if type(value) is slice:
        return all(map(_is_same, (value.start, value.stop, value.step), (old.start, old.stop, old.step)))
    return bool(value == old)


def parts_of(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in plain containers, each with ``_<key>`` for every key that leads to it."""
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(_MOST_PARTS):
        if not waiting:
            return
        path, each, depth = waiting.pop()
        if isinstance(each, torch.Tensor):
            yield path, each
        elif depth >= _DEEPEST:
            continue
        elif isinstance(each, Mapping):
            waiting += [(f"{path}_{key}", part, depth + 1) for key, part in each.items()]
        elif isinstance(each, (tuple, list)):
            waiting += [(f"{path}_{place}", part, depth + 1) for place, part in enumerate(each)]


def _shape_of(tensor: torch.Tensor) -> list[int] | str:
    try:
        return list(tensor.shape)
    except RuntimeError:
        # Nested tensors are of several shapes.
        return "[...]"


def _version(tensor: torch.Tensor) -> int:
    """How often it has been changed in place; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version
