"""Joining the parts of a distributed tensor, as each rank's ``placements`` tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import MissingError, ReadError
from ..layout.row_scale import presented
from ..record import Json
from .unshard import joined_shape

if TYPE_CHECKING:
    import torch

_REDUCED: dict[str, Callable[[Any], Any]] = {
    "sum": lambda parts: parts.sum(0, dtype=parts.dtype),
    "avg": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "min": lambda parts: parts.amin(0),
}


def is_part(record: Mapping[str, Any]) -> bool:
    """Whether a record's tensor is less than the whole."""
    placements = record.get("placements")
    return placements is not None and any(each != "R" for each in placements.get("placements", ()))


def whole_shape(record: Mapping[str, Any]) -> list[int]:
    """The whole tensor's shape."""
    return list(record["placements"]["shape"])


def assembled(record: Json, held: Mapping[int, Json], load: Callable[[Json], torch.Tensor]) -> torch.Tensor:
    """The whole tensor of a part's record; ``held`` are the records of it that the run has, by rank.

    Raises MissingError where a part is not there, ReadError where the parts do not make up a tensor.
    """
    own = record["placements"]
    where = record["name"]
    try:
        by_rank = {int(each["placements"]["rank"]): each for each in held.values()}
        by_rank.setdefault(int(own["rank"]), record)
        mesh, kinds, shape = own["mesh"], list(own["placements"]), tuple(own["shape"])
        coordinate = _coordinate(mesh, own["rank"])
        found = _along(mesh, kinds, coordinate, lambda rank: load(_there(by_rank, rank, where)))
    except MissingError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ReadError(
            f"{where}: the ranks' parts cannot be joined ({type(error).__name__}: {error})"
        ) from error
    if tuple(found.shape) != shape:
        raise ReadError(f"{where}: the ranks' parts make up {tuple(found.shape)}, not {shape}")
    return found


def _there(by_rank: Mapping[int, Json], rank: int, where: str) -> Json:
    if rank not in by_rank:
        advice = "capture(..., group=...) writes all ranks into one run, and `part` gives what one has stored"
        raise MissingError(
            f"{where}: it is a part of a tensor, and that of rank {rank} is not here ({advice})"
        )
    return by_rank[rank]


def _coordinate(mesh: Any, rank: int) -> list[int]:
    if not isinstance(mesh, list):
        if mesh != rank:
            raise ValueError(f"rank {rank} is not in the mesh")
        return []
    for place, inner in enumerate(mesh):
        try:
            return [place, *_coordinate(inner, rank)]
        except ValueError:
            continue
    raise ValueError(f"rank {rank} is not in the mesh")


def _along(mesh: Any, kinds: list[str], at: list[int], load: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """What a part of the mesh holds together; of equal parts this rank's own is taken."""
    import torch

    if not isinstance(mesh, list):
        return load(int(mesh))
    kind, *rest = kinds
    if kind == "R":
        return _along(mesh[at[0]], rest, at[1:], load)
    parts = [_along(each, rest, at[1:], load) for each in mesh]
    if kind[:1] == "S":
        return torch.cat(parts, int(kind[1:]))
    if kind[:1] != "P" or kind[1:] not in _REDUCED:
        raise ValueError(f"unknown placement {kind!r}")
    result: torch.Tensor = _REDUCED[kind[1:]](torch.stack(parts))
    return result


def as_whole(record: Json) -> Json:
    """The record of a whole tensor, of which ``record`` may be a rank's part; that has no hash."""
    if is_part(record):
        return {**presented(record), "shape": whole_shape(record), "hash": None}
    if "part" not in record:
        return record
    record = presented(record)
    return {**record, "shape": joined_shape(record["part"], record["shape"]), "hash": None}
