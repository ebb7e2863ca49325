"""Distributed tensors: the part that a rank holds, and how the parts make up the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ...layout.templates import compact


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, which may be in the process only where others have imported it."""
    cls = type(tensor)
    return cls.__name__ == "DTensor" and cls.__module__.startswith("torch.distributed")


def is_on_its_way(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the result of a collective that may still run."""
    return type(tensor).__name__ == "AsyncCollectiveTensor"


def arrived(tensor: Any) -> torch.Tensor:
    """The result of a collective, once it is there."""
    result: torch.Tensor = tensor.trigger_wait()
    return result


def has_dtensors(module: torch.nn.Module) -> bool:
    """Whether any parameter of a module's own is distributed."""
    return any(each is not None and is_dtensor(each) for each in module._parameters.values())


def local_part(tensor: Any) -> torch.Tensor:
    """The part of a DTensor that this rank holds, without its history."""
    local: torch.Tensor = tensor._local_tensor
    return (arrived(local) if is_on_its_way(local) else local).detach()


def placements_of(tensor: Any) -> str:
    """What ``step.json`` says of a DTensor's part, as JSON text.

    ``mesh`` has the global ranks, ``rank`` this one's, ``shape`` is the whole's, and ``placements`` has for
    each of the mesh's axes ``S<dim>``, ``R``, ``P<operation>``, or ``?`` for another kind.
    """
    mesh = tensor.device_mesh
    return compact(
        {
            "mesh": mesh.mesh.tolist(),
            "rank": int(torch.distributed.get_rank()),
            "shape": list(tensor.shape),
            "placements": [_placement(each) for each in tensor.placements],
        }
    )


def placements_of_rows(placements: str, axis: int, shape: Sequence[int]) -> str | None:
    """The same for rows that were cut out of the part, of this ``shape``; positions lay along ``axis``.

    None where the rows themselves are spread over ranks: which of them a rank holds is not known.
    """
    known = json.loads(placements)
    whole, extents, mesh = list(shape), [], known["mesh"]
    while isinstance(mesh, list):
        extents.append(len(mesh))
        mesh = mesh[0]
    for place, kind in enumerate(known["placements"]):
        if kind[:1] != "S":
            continue
        dim = int(kind[1:])
        if dim in (0, axis):
            if extents[place] > 1:
                return None
            known["placements"][place] = "R"
            continue
        # Samples and positions have become one axis in front of the others.
        now = dim if dim < axis or axis == 0 else dim - 1
        known["placements"][place] = f"S{now}"
        whole[now] = known["shape"][dim]
    return compact({**known, "shape": whole})


def _placement(placement: Any) -> str:
    kind = type(placement).__name__
    if kind == "Shard":
        return f"S{placement.dim}"
    if kind == "Replicate":
        return "R"
    return f"P{placement.reduce_op}" if kind == "Partial" else "?"
