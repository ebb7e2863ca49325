"""Joining what the ranks of a tensor-parallel group hold of one tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ReadError
from ..record import Json

if TYPE_CHECKING:
    import torch

Places = Mapping[int, Json]
_GROUPS = ("tp", "pcp", "pp", "dp")
_UNLIKE: Json = {
    "unknown": "each rank has another one, and nothing tells which part of what it is",
    "or_alike": True,
}
# Parts of one tensor differ by about as much as they are long.
_ROUNDED = 1 / 16
_KEYS = [f"{group}_{what}" for group in _GROUPS for what in ("rank", "size")]


def places_of(document: Json) -> Places:
    """Each rank's place in the groups of ranks, from a ``run.json``; none where it has none.

    Raises ReadError when the entry is damaged.
    """
    world_size, listed = int(document["world_size"]), document.get("ranks", [])
    try:
        places = {int(place["rank"]): dict(place) for place in listed}
        sound = all(type(place[key]) is int for place in places.values() for key in _KEYS)
    except (KeyError, TypeError, ValueError) as error:
        raise ReadError(f"run.json: damaged entry 'ranks' ({type(error).__name__}: {error})") from error
    if not sound or (listed and (len(places) != world_size or max(places) != world_size - 1)):
        raise ReadError(f"run.json: 'ranks' does not describe ranks 0 to {world_size - 1}")
    return places


def group_of(places: Places, rank: int) -> list[int]:
    """The ranks that share a tensor with ``rank``, in the order in which their parts are joined."""
    own = places.get(rank)
    if own is None:
        return [rank]
    others = [
        other
        for other, place in places.items()
        if all(place[f"{group}_rank"] == own[f"{group}_rank"] for group in _GROUPS if group != "tp")
    ]
    return sorted(others, key=lambda other: int(places[other]["tp_rank"]))


def all_committed(
    committed: Collection[int], begun: Collection[int], world_size: int, places: Places
) -> bool:
    """Whether every rank that took part in a step has committed it.

    Data-parallel engines step by themselves: where one of them has begun nothing, it had no such step.
    """
    present = {rank for rank in committed if rank < world_size}
    if len(present) == world_size:
        return True
    engines: dict[int, set[int]] = {}
    for rank, place in places.items():
        engines.setdefault(int(place["dp_rank"]), set()).add(rank)
    taking_part = [ranks for ranks in engines.values() if ranks & {*present, *begun}]
    return len(engines) > 1 and bool(taking_part) and all(ranks <= present for ranks in taking_part)


def records_of_ranks(documents: Mapping[int, Json], places: Places) -> dict[str, Json]:
    """The records of all ranks' ``step.json`` by name, each with its ``rank`` and, if any, its ``part``.

    Raises ReadError where a description of parts is damaged.
    """
    found: dict[str, Json] = {}
    for rank, document in documents.items():
        sharding, split = document.get("sharding"), _split_by_context(places, rank)
        for record in document["records"]:
            part = split or part_of(sharding, record)
            more = {"rank": rank} if part is None else {"rank": rank, "part": part}
            found[record["name"]] = {**record, **more}
    for record in _unlike(found.values(), places):
        place = places[record["rank"]]
        record["part"] = {**_UNLIKE, "tp_rank": place["tp_rank"], "tp_size": place["tp_size"]}
    return found


def origin_of(record: Json) -> tuple[Any, ...]:
    """Which captured tensor a record is of, whatever rank and device had it."""
    return (record["module"], record["call"], record["direction"], *record["path"])


def _unlike(records: Iterable[Json], places: Places) -> list[Json]:
    """Those that pass for whole, but are not the same on all tensor-parallel ranks that have them."""
    held: dict[tuple[Any, ...], list[Json]] = {}
    for record in records:
        place = places.get(record["rank"])
        if not {"part", "placements"} & record.keys() and place is not None and place["tp_size"] > 1:
            group = [place[f"{each}_rank"] for each in _GROUPS if each != "tp"]
            held.setdefault((*group, *origin_of(record)), []).append(record)
    return [each for same in held.values() if len(set(map(_content, same))) > 1 for each in same]


def _content(record: Json) -> tuple[Any, ...]:
    return record.get("hash"), record["dtype"], *record["shape"]


def part_of(sharding: Any, record: Mapping[str, Any]) -> Json | None:
    """How a record's tensor is a part of a larger one, as its ``step.json`` says; None when it is whole."""
    if sharding is None:
        return None
    direction = str(record["direction"]).removeprefix("post_fwd_")
    try:
        sides = sharding["tensors"].get(record["module"], {})
        side = sides.get(direction, {})
        described = side.get("/".join(map(str, record["path"])), side.get("*"))
        if described is None:
            return None
        part = {**described, "tp_rank": sharding["tp_rank"], "tp_size": sharding["tp_size"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ReadError(f"damaged sharding in step.json ({type(error).__name__}: {error})") from error
    if not _sound(part):
        raise ReadError(f"damaged sharding in step.json: {str(part)[:200]}")
    return part


def _split_by_context(places: Places, rank: int) -> Json | None:
    """The description of a rank's tensor where ranks share a prompt's tokens; None where each has all."""
    own = places.get(rank, {})
    if int(own.get("pcp_size", 1)) == 1:
        return None
    problem = "prefill context parallelism splits the tokens over ranks"
    return {"unknown": problem, "tp_rank": own["tp_rank"], "tp_size": own["tp_size"]}


def _sound(part: Json) -> bool:
    lists = [part.get(key) or [] for key in ("parts", "copies")]
    numbers = [part["tp_rank"], part["tp_size"], part.get("dim", 0)]
    if not all(isinstance(each, list) for each in lists):
        return False
    numbers += [number for each in lists for number in each]
    whole = all(type(number) is int for number in numbers) and all(number > 0 for number in lists[1])
    return whole and ("dim" in part or part.get("sum") is True or isinstance(part.get("unknown"), str))


def joined(part: Json, tensors: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """The whole tensor, from all ranks' ``tensors`` in the group's order and the description of a part.

    Raises ReadError, naming ``name``, when the tensors cannot be parts of one.
    """
    if len(tensors) != part["tp_size"]:
        raise ReadError(f"{name}: {len(tensors)} ranks for the {part['tp_size']} parts of a tensor")
    try:
        if part.get("or_alike") and _all_alike(tensors):
            return tensors[0]
        if "unknown" in part:
            raise ValueError(part["unknown"])
        if part.get("or_whole") and _all_equal(tensors):
            return tensors[0]
        return _added(tensors) if part.get("sum") else _concatenated(part, tensors)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ReadError(f"{name}: the ranks' parts cannot be joined ({error})") from error


def joined_shape(part: Json, shape: Sequence[int]) -> list[int]:
    """The whole tensor's shape, from that of one part; the part's own where they cannot be joined."""
    whole = list(shape)
    dim = part.get("dim")
    if part.get("sum") or dim is None or not -len(whole) <= dim < len(whole):
        return whole
    sizes = part.get("parts") or [whole[dim]]
    copies = part.get("copies", [1] * len(sizes)) or [1] * len(sizes)
    ranks = part["tp_size"]
    whole[dim] = sum(size * len(range(0, ranks, same)) for size, same in zip(sizes, copies, strict=False))
    return whole


def _all_equal(tensors: Sequence[torch.Tensor]) -> bool:
    import torch

    # By their bytes: a NaN is no other value on another rank.
    first, *others = (each.contiguous().flatten().view(torch.uint8) for each in tensors)
    return all(torch.equal(each, first) for each in others)


def _all_alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether ranks differ by no more than what kernels round, which are not the same in each run."""
    import torch

    first, *others = tensors
    if not all(each.shape == first.shape and each.dtype == first.dtype for each in others):
        return False
    if not first.dtype.is_floating_point:
        return _all_equal(tensors)
    whole = first.double()
    # What is not a number is nothing like anything, unless all have it in the same place.
    return all(
        torch.equal(each.isnan(), first.isnan())
        and bool((each.double() - whole).nan_to_num().norm() <= _ROUNDED * whole.nan_to_num().norm())
        for each in others
    )


def _added(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    exact = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.stack([each.to(exact) for each in tensors]).sum(0).to(tensors[0].dtype)


def _concatenated(part: Json, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    dim = int(part["dim"])
    extent = tensors[0].shape[dim]
    sizes = part.get("parts") or [extent]
    copies = part.get("copies", [1] * len(sizes))
    if copies is None or len(copies) != len(sizes):
        raise ValueError("it is not known which of them are copies")
    if sum(sizes) != extent:
        raise ValueError(f"they have {extent} elements along dimension {dim}, not {sum(sizes)}")
    import torch

    pieces: list[torch.Tensor] = []
    begin = 0
    for size, same in zip(sizes, copies, strict=True):
        pieces += [each.narrow(dim, begin, size) for each in tensors[:: int(same)]]
        begin += size
    return torch.cat(pieces, dim)
