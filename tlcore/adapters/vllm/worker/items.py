"""Whose the rows are that an encoder works on: images and other items, each of one request's prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ....layout.rows import ANY, ITEM_PARTS, ITEM_TOKENS, ITEMS, RowSet
from ....record import Json


def item_sets(runner: Any, refs: Sequence[tuple[str, Any]], known: Callable[[str], Json]) -> list[RowSet]:
    """The row sets of one encoder call on the items ``refs``: (request id, where in the prompt it stands).

    Tensors may have a row for each item, one for each token that stands for an item, or one for each part of
    what went in (patches): the latter have an owner, and no position in the prompt.
    """
    items, tokens = [], []
    for place, (request, where) in enumerate(refs):
        entry = {"request_id": request, **known(request)}
        items.append({**entry, "first_row": place, "rows": 1, "first_position": int(where.offset)})
        tokens += [{**entry, **run} for run in _runs(where)]
    data = [_item(runner, request, where) for request, where in refs]
    listed = _sizes(data)
    single = _single(refs, data, listed)
    sets = [RowSet(ITEMS, items, single=single), RowSet(ITEM_TOKENS, _in_sequence(tokens), single=single)]
    for sizes in listed:
        parts = [
            {"request_id": request, **known(request), "rows": size}
            for (request, _), size in zip(refs, sizes, strict=True)
        ]
        sets.append(RowSet(ITEM_PARTS, _in_sequence(parts), single=single))
    return sets


def _single(
    refs: Sequence[tuple[str, Any]], data: Sequence[Any], listed: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """The shapes of what a call gets or gives of one item alone, where it has several.

    Some encoders take images as a list, and some of their modules run once for each.
    """
    if len(refs) < 2:
        return ()
    # Of each token one vector; of each part whatever.
    shapes: set[tuple[int, ...]] = {(sum(run["rows"] for run in _runs(where)), ANY) for _, where in refs}
    shapes |= {(each, *[ANY] * more) for sizes in listed for each in sizes for more in range(1, 5)}
    for item in data:
        for key in item or ():
            shapes.add(tuple(map(int, _shape_of(item, key))))
    return tuple(sorted(shape for shape in shapes if shape))


def _in_sequence(entries: list[Json]) -> list[Json]:
    first = 0
    for entry in entries:
        entry["first_row"] = first
        first += entry["rows"]
    return entries


def _runs(where: Any) -> list[Json]:
    """The positions of the tokens that stand for an item, in runs."""
    offset, mask = int(where.offset), getattr(where, "is_embed", None)
    if mask is None:
        return [{"rows": int(where.length), "first_position": offset}]
    runs: list[Json] = []
    before = False
    for place, here in enumerate(mask.tolist()):
        if here and before:
            runs[-1]["rows"] += 1
        elif here:
            runs.append({"rows": 1, "first_position": offset + place})
        before = bool(here)
    return runs


def _sizes(data: Sequence[Any]) -> list[list[int]]:
    """How many rows each item has of each thing that the items consist of and that is joined for the call."""
    if any(item is None for item in data):
        return []
    found: list[list[int]] = []
    for key in data[0]:
        sizes = [_rows_of(item, key) for item in data]
        if all(size is not None for size in sizes) and sizes not in found:
            found.append([int(size) for size in sizes if size is not None])
    return found


def _item(runner: Any, request: str, where: Any) -> Any:
    for feature in runner.requests[request].mm_features:
        if feature.mm_position is where:
            return feature.data
    return None


def _shape_of(item: Any, key: str) -> Sequence[int]:
    shape: Sequence[int] = getattr(getattr(item.get(key), "data", None), "shape", ())
    return shape


def _rows_of(item: Any, key: str) -> int | None:
    shape = _shape_of(item, key)
    joined = "Flat" in type(getattr(item.get(key), "field", None)).__name__
    return int(shape[0]) if joined and len(shape) > 0 else None
