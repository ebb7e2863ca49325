"""Values like a model's own with another run's tensors in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..layout.names import PathKey
from ..reader import Arguments, OpaqueObject, Skipped
from .injected_dtypes import conversion, rounding, unlike

_MOST_SHARED = 4
SCALARS = (bool, int, float, str)
Path = tuple[PathKey, ...]
# Positional and keyword ones.
CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


class UnlikeError(Exception):
    """A stored value cannot stand for the model's own; the message says why."""


class Fitted:
    """Stored tensors in the place of a model's own, in the dtype and on the device of these.

    What had to be ``converted`` for it is noted there, and whether any went beyond the new dtype's range.
    """

    def __init__(self, converted: dict[str, bool]) -> None:
        self._converted = converted
        # By the id of the model's own: that, which must live so long, the stored one, and what stands for it.
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        # What stands for memory that several of the model's own share.
        self._shared: dict[int, torch.UntypedStorage | None] = {}

    def of(self, own: Any, stored: Any) -> Any:
        """`like`, where tensors that share memory go on sharing it."""
        together: dict[int, list[torch.Tensor]] = {}
        for each in {id(each): each for _, each in _tensors_in(own)}.values():
            together.setdefault(_storage_of(each), []).append(each)
        together.pop(0, None)
        self._shared = {storage: None for storage, tensors in together.items() if _share_it(tensors)}
        return self.like(own, stored)

    def like(self, own: Any, stored: Any) -> Any:
        """A value like the model's own with the stored tensors. Raises UnlikeError where they do not fit."""
        if isinstance(own, torch.Tensor):
            return self._fitted(own, stored)
        if own is None or isinstance(own, SCALARS):
            return own
        if isinstance(own, Mapping) and (items := stored_items(own, stored)) is not None:
            return _like_mapping(own, lambda key, value: self.like(value, items[str(key)]))
        if isinstance(own, (tuple, list)) and isinstance(stored, (tuple, list)) and len(own) == len(stored):
            return _like_sequence(own, lambda place, value: self.like(value, stored[place]))
        if isinstance(stored, OpaqueObject) and not stored.items:
            return own
        raise UnlikeError(f"nothing can stand for a result that is a {type(own).__name__}")

    def _fitted(self, own: torch.Tensor, stored: Any) -> torch.Tensor:
        if isinstance(stored, Skipped):
            raise UnlikeError(f"its result was not stored ({stored.reason})")
        if not isinstance(stored, torch.Tensor) or own.shape != stored.shape:
            raise UnlikeError("the other run's result has another shape")
        if (why_not := unlike(stored.dtype, own.dtype)) is not None:
            raise UnlikeError(why_not)
        # What is one tensor in several places stays one.
        if (known := self._tensors.get(id(own))) is not None:
            return known[2]
        fitted = stored.to(device=own.device, dtype=own.dtype)
        if stored.dtype != own.dtype:
            found = conversion(stored.reshape(1, -1), fitted.reshape(1, -1))
            if found.changed.any():
                what = rounding(stored.dtype, own.dtype)
                self._converted[what] = self._converted.get(what, False) or bool(found.overflowed.any())
        if _storage_of(own) in self._shared:
            fitted = self._sharing(own, fitted)
        self._tensors[id(own)] = own, stored, fitted
        return fitted

    def _sharing(self, own: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
        """The same in memory that what stands for the others has, too."""
        storage = self._shared[_storage_of(own)]
        if storage is None:
            shared = own.untyped_storage()
            whole = own.new_empty(0, dtype=torch.uint8).set_(shared, 0, (shared.nbytes(),), (1,))
            storage = self._shared[_storage_of(own)] = whole.clone().untyped_storage()
        made = fitted.new_empty(0).set_(storage, own.storage_offset(), own.size(), own.stride())
        return made.copy_(fitted)

    def write_into_arguments(self, given: CallArguments, stored: Callable[[], Arguments]) -> None:
        """Let the arguments of a module that works in place hold what stands for its result.

        Code behind it may go on with those. Whether it writes is told by what was ``stored`` of them: the
        values that the other run's module was given and gave.
        """
        in_place = [
            (path, fitted)
            for path, argument in _tensors_in(given)
            for own, _, fitted in self._tensors.values()
            if _is_same_memory(own, argument)
        ]
        if not in_place:
            return
        before = stored()
        known = dict(_tensors_in((before.args, before.kwargs)))
        arguments = dict(_tensors_in(given))
        for path, fitted in in_place:
            was = known.get(path)
            if was is None or was.shape != fitted.shape or was.to(fitted.device, fitted.dtype).equal(fitted):
                continue
            with torch.no_grad():
                arguments[path].copy_(fitted)


def _storage_of(tensor: torch.Tensor) -> int:
    """By what memory is known that results may share; 0 where it does not matter, or cannot be told."""
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    if not plain or tensor.requires_grad or not tensor.numel():
        return 0
    return tensor.untyped_storage().data_ptr()


def _share_it(tensors: list[torch.Tensor]) -> bool:
    """Whether tensors share memory that is mostly theirs, and not that of a large cache."""
    whole = tensors[0].untyped_storage().nbytes()
    return len(tensors) > 1 and whole <= _MOST_SHARED * sum(each.nbytes for each in tensors)


def _is_same_memory(own: torch.Tensor, argument: torch.Tensor) -> bool:
    """Whether a result is an argument; one that autograd follows is left alone."""
    if own.requires_grad or argument.requires_grad or not own.numel():
        return False
    if own is argument:
        return True
    alike = (own.shape, own.dtype, own.device) == (argument.shape, argument.dtype, argument.device)
    strided = own.layout is argument.layout is torch.strided
    return alike and strided and own.stride() == argument.stride() and own.data_ptr() == argument.data_ptr()


def _tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """The tensors in plain containers by the texts of the keys that lead to them."""
    if isinstance(value, torch.Tensor):
        yield tuple(map(str, path)), value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors_in(each, (*path, key))
    elif isinstance(value, (tuple, list)):
        for place, each in enumerate(value):
            yield from _tensors_in(each, (*path, place))


def stored_items(own: Mapping[Any, Any], stored: Any) -> dict[str, Any] | None:
    """The items of a stored mapping by the texts of its keys, where these are those of ``own``; else None."""
    if not isinstance(stored, Mapping):
        return None
    items = {str(key): value for key, value in stored.items()}
    return items if len(items) == len(own) and {*map(str, own)} == items.keys() else None


def with_each_tensor(own: Any, made: Callable[[Path, torch.Tensor], torch.Tensor], path: Path = ()) -> Any:
    """A value like the model's own, with what is ``made`` of each tensor in it, told by the way to it.

    Raises UnlikeError for a value in which tensors may be that are not found.
    """
    if isinstance(own, torch.Tensor):
        return made(path, own)
    if own is None or isinstance(own, SCALARS):
        return own
    if isinstance(own, Mapping):
        return _like_mapping(own, lambda key, value: with_each_tensor(value, made, (*path, key)))
    if isinstance(own, (tuple, list)):
        return _like_sequence(own, lambda place, value: with_each_tensor(value, made, (*path, place)))
    raise UnlikeError(f"nothing can stand for a result that is a {type(own).__name__}")


def _like_mapping(own: Mapping[Any, Any], part: Callable[[Any, Any], Any]) -> Any:
    made: Any = copy.copy(own)
    for key, value in own.items():
        made[key] = part(key, value)
    return made


def _like_sequence(own: tuple[Any, ...] | list[Any], part: Callable[[int, Any], Any]) -> Any:
    items = [part(place, value) for place, value in enumerate(own)]
    return type(own)(*items) if hasattr(own, "_fields") else type(own)(items)
