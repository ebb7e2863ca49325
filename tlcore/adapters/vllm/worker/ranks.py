"""Where each rank stands among vLLM's tensor, pipeline and data parallel groups."""

from __future__ import annotations

from typing import Any

from ....record import Json
from ..frontend.check import unknown_vllm

# From the fastest changing to the slowest, as vLLM numbers its ranks; pcp is prefill context parallel.
_DIMENSIONS = (
    ("tp", "tensor_parallel_size"),
    ("pcp", "prefill_context_parallel_size"),
    ("pp", "pipeline_parallel_size"),
)


def layout_of(parallel_config: Any, world_size: int) -> list[Json]:
    """For each of ``world_size`` global ranks its ``<group>_rank`` and ``<group>_size``.

    The groups are ``tp``, ``pcp``, ``pp`` and ``dp``; ranks and sizes count processes. ``ep_size``:
    how many of them share the experts, where each has whole ones.
    """
    sizes = {group: int(getattr(parallel_config, name, 1)) for group, name in _DIMENSIONS}
    inside = 1
    for size in sizes.values():
        inside *= size
    sizes["dp"] = max(1, world_size // inside)
    spread = sizes["tp"] * sizes["pcp"] * sizes["dp"]
    whole = spread > 1 and getattr(parallel_config, "enable_expert_parallel", False)
    experts = {"ep_size": spread} if whole else {}
    return [_place(rank, sizes) | experts for rank in range(world_size)]


def _place(rank: int, sizes: dict[str, int]) -> Json:
    place: Json = {"rank": rank}
    for group, size in sizes.items():
        rank, own = divmod(rank, size)
        place |= {f"{group}_rank": own, f"{group}_size": size}
    return place


def check_place(place: Json) -> None:
    """Hold this process's place against vLLM's own groups, where they are set up.

    Raises CaptureError, naming the vLLM version, when they differ: shards would be joined in a wrong
    order.
    """
    from vllm.distributed import parallel_state

    for group, get in (("tp", parallel_state.get_tp_group), ("pp", parallel_state.get_pp_group)):
        try:
            found = get()
        except AssertionError:
            continue
        if (found.rank_in_group, found.world_size) != (place[f"{group}_rank"], place[f"{group}_size"]):
            raise unknown_vllm(
                f"rank {place['rank']} is number {found.rank_in_group} of {found.world_size} in its {group}"
                f" group, not {place[f'{group}_rank']} of {place[f'{group}_size']}"
            )
