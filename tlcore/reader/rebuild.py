"""From a call's structure JSON back to nested Python values with tensors in them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ReadError
from ..layout.row_scale import presented_node
from ..record import Json

if TYPE_CHECKING:
    import torch

Load = Callable[[str], "torch.Tensor"]
_SCALARS = ("bool", "int", "float", "str")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Stands where a tensor was that is described but not stored, with the ``reason``."""

    reason: str
    shape: tuple[int, ...]
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class OpaqueObject:
    """Stands where an object was; ``class_name`` is its class, ``items`` what was stored of it, by name.

    These are its attributes, too: ``output.latent_dist.mean``. Without items it holds no tensor, or it was
    ``skipped`` for a reason.
    """

    class_name: str
    items: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None

    def __getattr__(self, name: str) -> Any:
        items: Mapping[str, Any] = object.__getattribute__(self, "items")
        if name in items:
            return items[name]
        raise AttributeError(f"{self.class_name}: nothing of the name {name!r} was stored")

    def __getitem__(self, name: str) -> Any:
        return self.items[name]


class Arguments(NamedTuple):
    """The arguments of a call: positional ``args`` and keyword ``kwargs``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def rebuild(node: Json, load: Load) -> Any:
    """The value that a structure node describes; ``load`` maps a tensor's ``file`` to the tensor.

    Raises ReadError for a node that is no structure.
    """
    try:
        return _rebuild(node, load)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"not a tensor structure: {type(error).__name__}: {error}") from error


def rebuild_arguments(node: Json, load: Load) -> Arguments:
    """The arguments that an ``inputs.json`` describes. Raises ReadError as `rebuild` does."""
    kwargs = rebuild(node["kwargs"], load) if "kwargs" in node else {}
    return Arguments(tuple(rebuild(node, load)), kwargs)


def _rebuild(node: Mapping[str, Any], load: Load) -> Any:
    kind = node["type"]
    if kind == "tensor":
        return _tensor(node, load)
    if kind == "dict":
        return {key: _rebuild(item, load) for key, item in node["items"].items()}
    if kind in ("tuple", "list"):
        items = [_rebuild(item, load) for item in node["items"]]
        return items if kind == "list" else _tuple(node, items)
    if kind == "none":
        return None
    if kind in _SCALARS:
        # Infinities and NaN are written as text, which JSON numbers cannot express.
        return float(node["value"]) if kind == "float" else node["value"]
    if kind == "object":
        parts = {key: _rebuild(item, load) for key, item in node.get("items", {}).items()}
        return OpaqueObject(str(node["class"]), parts, node.get("skipped"))
    raise ReadError(f"not a tensor structure: unknown type {kind!r}")


def _tensor(node: Mapping[str, Any], load: Load) -> torch.Tensor | Skipped:
    if "file" in node:
        return load(str(node["file"]))
    node = presented_node(node)
    return Skipped(str(node["skipped"]), tuple(node["shape"]), str(node["dtype"]), str(node["device"]))


def _tuple(node: Mapping[str, Any], items: list[Any]) -> tuple[Any, ...]:
    fields = node.get("fields")
    if fields is None:
        return tuple(items)
    name = str(node.get("class", "Fields")).rpartition(".")[2]
    # Typed as Any: the type checker knows only tuples whose fields stand in the source.
    make: Any = namedtuple
    made: tuple[Any, ...] = make(name if name.isidentifier() else "Fields", fields, rename=True)(*items)
    return made
