"""Tensors that were captured with their statistics, whether their bytes were stored or not."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ReadError
from ..layout.checks import LARGEST_SIZE, is_whole
from ..layout.directions import DIRECTIONS, gradient_direction, is_amid
from ..layout.names import PathKey, rank_suffix, step_dir, within
from ..layout.row_scale import presented_node
from ..record import Json
from ..statistics.summary import KEYS, Statistics
from .documents import is_tensor_name

if TYPE_CHECKING:
    from .step import Step

_HASH = re.compile(r"[a-z0-9\-]{1,32}:[0-9a-f]{32}")
_Identity = tuple[str, int]


def described(step: Step) -> list[Json]:
    """An entry for each of a step's tensors that has statistics, rank by rank in order of execution.

    It has a record's ``name``, ``rank``, ``module``, ``call``, ``direction``, ``path``, ``dtype``, ``shape``
    and ``device``, and its ``stats`` and whether it is ``stored``. Raises ReadError for a damaged structure.
    """
    return [entry for rank in step.ranks for entry in _of_rank(step, rank)]


def statistics_of(entry: Json) -> Statistics:
    """The statistics in an entry of `described`."""
    return Statistics(**{key: entry["stats"][key] for key in KEYS})


def _of_rank(step: Step, rank: int) -> Iterator[Json]:
    identities = {
        str(record["name"]).split("/")[1]: (str(record["module"]), int(record["call"]))
        for record in step.documents[rank]["records"]
    }
    structures = step.structures(rank)
    calls = [str(call) for call in step.documents[rank]["calls"]]
    for call in calls:
        if call not in identities:
            unstored = step.call(call, rank)
            identities[call] = unstored.module, unstored.index
    amid: dict[str, list[str]] = {}
    for name in structures:
        directory, _, file = name.rpartition("/")
        if is_amid(file):
            amid.setdefault(directory, []).append(file.removesuffix(".json"))
    order = list(_in_order([(call, identities[call][0]) for call in calls], amid))
    for call, direction in (*order, *_backwards(order, structures)):
        name = f"{call}/{direction}.json"
        if name not in structures:
            continue
        where = f"{step_dir(step.number)}/{name.removesuffix('.json')}{rank_suffix(rank)}.json"
        for path, node in tensors_in(structures[name]):
            if "stats" in node:
                yield _entry(node, rank, identities[call], direction, path, f"{step}: {where}")


def _entry(
    node: Mapping[str, Any],
    rank: int,
    identity: _Identity,
    direction: str,
    path: tuple[PathKey, ...],
    where: str,
) -> Json:
    name = str(node.get("file", node.get("name"))).removesuffix(".pt")
    if not is_tensor_name(name) or not is_sound(node["stats"]):
        raise ReadError(f"{where}: damaged statistics")
    # Statistics are of the values, not of rows with a scale.
    node = presented_node(node)
    return {
        "name": name,
        "rank": rank,
        "module": identity[0],
        "call": identity[1],
        "direction": direction,
        "path": list(path),
        "dtype": str(node["dtype"]).removeprefix("torch."),
        "shape": node["shape"],
        "device": node["device"],
        "stats": node["stats"],
        "stored": "file" in node,
    }


def _in_order(
    calls: Sequence[tuple[str, str]], amid: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """The sides of calls in order of execution, from the calls (directory, module) in order of entry.

    A call lasts as long as calls of modules within its own follow. What came amid it is before its result.
    """
    lasting: list[tuple[str, str]] = []
    for call, module in calls:
        while lasting and not within(module, lasting[-1][1]):
            yield from _end(lasting.pop()[0], amid)
        yield call, "inputs"
        lasting.append((call, module))
    while lasting:
        yield from _end(lasting.pop()[0], amid)


def _end(call: str, amid: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    yield from ((call, direction) for direction in (*amid.get(call, ()), *DIRECTIONS[1:]))


def _backwards(order: Sequence[tuple[str, str]], structures: Container[str]) -> Iterator[tuple[str, str]]:
    """The sides with gradients, one backward after the other, from the last call to the first."""
    ends = [(call, direction) for call, direction in reversed(order) if direction in ("inputs", "outputs")]
    for backward in itertools.count(1):
        sides = [(call, gradient_direction(direction, backward)) for call, direction in ends]
        found = [(call, direction) for call, direction in sides if f"{call}/{direction}.json" in structures]
        if not found:
            return
        yield from found


def tensors_in(structure: Json) -> Iterator[tuple[tuple[PathKey, ...], Json]]:
    """Every tensor of a checked structure, with the keys that lead to it."""
    yield from _tensors(structure, ())
    # Only arguments as a whole have keywords.
    yield from _tensors(structure.get("kwargs", {}), ())


def _tensors(node: Json, path: tuple[PathKey, ...]) -> Iterator[tuple[tuple[PathKey, ...], Json]]:
    if node.get("type") == "tensor":
        yield path, node
        return
    items = node.get("items", ())
    pairs: Any = items.items() if isinstance(items, Mapping) else enumerate(items)
    for key, child in pairs:
        yield from _tensors(child, (*path, key))


def is_sound(stats: Any) -> bool:
    """Whether a structure's ``stats`` are all there, and numbers."""
    if not isinstance(stats, dict) or not stats.keys() >= set(KEYS):
        return False
    floats = (stats[key] for key in ("min", "max", "mean", "std", "l2"))
    counts = (stats[key] for key in ("numel", "zeros", "nans", "infs"))
    return (
        all(each is None or (type(each) in (int, float) and _is_finite(each)) for each in floats)
        and all(is_whole(each, 0, LARGEST_SIZE) for each in counts)
        and isinstance(stats["hash"], str)
        and _HASH.fullmatch(stats["hash"]) is not None
    )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
