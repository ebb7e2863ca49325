"""What a captured call was given, as values that a module can be called with again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ...errors import ReadError, missing
from ...layout.windows import row_choices
from ...reader import Arguments, Call, OpaqueObject, Skipped
from ...record import Json

Place = int | str


def by_place(call: Call, replaced: Mapping[Place, Any], callee: Callable[..., Any]) -> dict[Place, Any]:
    """Arguments to replace, by position where the call had them by position.

    Raises MissingError for one that the call had not, and that what is called now does not take.
    """
    try:
        parameters = inspect.signature(getattr(callee, "forward", callee)).parameters
    except (TypeError, ValueError):
        return dict(replaced)
    structure = call.structure("inputs")
    given, named = len(structure.get("items", ())), structure.get("kwargs", {}).get("items", {})
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    order = [name for name, each in parameters.items() if each.kind in by_position]
    places = dict(zip(order[:given], range(given), strict=False))
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    for key in replaced:
        if isinstance(key, str) and not takes_all and key not in parameters and key not in named:
            raise missing(
                "argument", key, f"{call.directory}: {type(callee).__name__}", {*parameters, *named}
            )
    return {
        key if isinstance(key, int) or key in named else places.get(key, key): value
        for key, value in replaced.items()
    }


def arguments_of(call: Call, replaced: Mapping[Place, Any]) -> Arguments:
    """A call's stored arguments, some of them ``replaced`` by position or name.

    Raises ReadError where one was not stored, or is an object of which only its tensors were.
    """
    # A module computes in the dtype that it was given.
    args, kwargs = call.original_inputs
    for key in replaced:
        if isinstance(key, int) and not 0 <= key < len(args):
            raise ReadError(f"{call.directory}: there is no positional argument {key}, it had {len(args)}")
    positional = [replaced.get(place, value) for place, value in enumerate(args)]
    named = {**kwargs, **{key: value for key, value in replaced.items() if isinstance(key, str)}}
    everything: list[tuple[Place, Any]] = [*enumerate(positional), *named.items()]
    for place, value in everything:
        if place not in replaced:
            _check(value, place, (place,), call)
    return Arguments(tuple(positional), named)


def _check(value: Any, place: Place, path: tuple[Any, ...], call: Call) -> None:
    where = f"{call.directory}: argument {'.'.join(map(str, path))}"
    hint = f"give the argument in its place: --set {place}=JSON, or replace={{{place!r}: ...}}"
    if isinstance(value, Skipped):
        raise ReadError(f"{where} was not stored ({value.reason}); {hint}")
    if isinstance(value, OpaqueObject):
        if value.class_name.endswith("Cache"):
            hint += "; where there was nothing in it yet, as for a whole prompt, that is null (None)"
        raise ReadError(f"{where} is a {value.class_name}, which a run does not hold; {hint}")
    for key, item in _items(value):
        _check(item, place, (*path, key), call)


def rows_lacking(config: Mapping[str, Any]) -> Iterator[str]:
    """What to know of the arguments in a run whose ``config`` chose some rows of the batch."""
    if found := row_choices(config):
        yield f"the run has chosen rows alone ({found}), and what relates rows to one another needs them all"


def refused(
    call: Call, replaced: Mapping[Place, Any], error: Exception, config: Mapping[str, Any]
) -> ReadError | None:
    """Why a module may not have taken its arguments: one was an object, of which a run has but the parts,
    or rows of them were left out."""
    structure = call.structure("inputs")
    places: list[tuple[Place, Json]] = [*enumerate(structure.get("items", ()))]
    places += structure.get("kwargs", {}).get("items", {}).items()
    for place, node in places:
        found = None if place in replaced else _class_in(node)
        if found is not None:
            where = f"{call.directory}: argument {place} was or held a {found}, of which a run has the parts"
            hint = f"give it: replace={{{place!r}: ...}}"
            return ReadError(f"{where}; {hint} ({type(error).__name__}: {error})")
    for lacking in rows_lacking(config):
        return ReadError(f"{call.directory}: {lacking} ({type(error).__name__}: {error})")
    return None


def _class_in(node: Json) -> str | None:
    """The class of an object whose parts stand in a structure as a dictionary."""
    if node.get("type") == "dict" and "class" in node:
        return str(node["class"])
    items = node.get("items", ())
    children = items.values() if isinstance(items, Mapping) else items
    return next((found for each in children if (found := _class_in(each)) is not None), None)


def on_each(
    value: Any, change: Callable[[torch.Tensor], Any], other: Callable[[Any], Any] | None = None
) -> Any:
    """The value with each tensor in plain containers changed, and anything else as ``other`` gives it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: on_each(item, change, other) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(on_each(item, change, other) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(on_each(item, change, other) for item in value)
    return value if other is None else other(value)


def tensors_of(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], torch.Tensor | Skipped]:
    """The tensors in a value by the keys that lead to them, in order; what was not stored, too."""
    if isinstance(value, (torch.Tensor, Skipped)):
        return {path: value}
    if isinstance(value, OpaqueObject):
        value = value.items
    found: dict[tuple[Any, ...], torch.Tensor | Skipped] = {}
    for key, item in _items(value):
        found |= tensors_of(item, (*path, key))
    return found


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (tuple, list)) else ()
