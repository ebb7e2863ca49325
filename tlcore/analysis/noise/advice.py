"""Which further run of the reference would tell whether two runs' differences are noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...layout.dtypes import torch_dtype
from ...reader import Run
from ..makings import settings_apart
from ..matching.pairs import Pair
from ..results import TensorResult
from .counterparts import Pieces


def advice(
    a: Run, b: Run, pieces: Sequence[tuple[Pair, Pieces]], results: Sequence[TensorResult]
) -> list[str]:
    """A note on what runs that differ in values differ in besides, and which run would settle it."""
    if not any(each.status == "different" for each in results):
        return []
    apart = list(known_apart(a, b, pieces))
    batches = other_batches(pieces)
    if a.is_foreign or b.is_foreign:
        also = f"; the runs differ in {', '.join(apart)}" if apart else ""
        return [
            "a dump of another tool does not tell its versions and settings, which may round otherwise"
            f"{also}; a further run of A, given with --noise, tells how far its own are apart"
        ]
    if not apart and not batches:
        return [
            "the runs are of the same versions, dtypes and batches; a rerun of A, given with --noise, tells"
            " whether they repeat bit by bit"
        ]
    if not apart:
        unchanged = all(each.status == "bitwise" for each in results if _is_given(each))
        also = ", inputs" if unchanged else ""
        return [
            f"the runs differ in nothing but batches, as far as they tell (versions, dtypes{also} are the"
            " same); a further run of A in other batches, given with --noise, tells whether that is all"
        ]
    if batches:
        apart.append("batches")
    return [
        f"the runs differ in {', '.join(apart)}; a further run of A that differs from it in that alone, given"
        " with --noise, tells what comes of it"
    ]


def known_apart(a: Run, b: Run, pieces: Sequence[tuple[Pair, Pieces]]) -> Iterator[str]:
    """What two runs say that they differ in, but for their batches."""
    # Another tool's dump does not say what it was made with.
    if not (a.is_foreign or b.is_foreign):
        yield from _made_apart(a, b)
    if a.world_size != b.world_size:
        yield f"ranks ({a.world_size} against {b.world_size})"
    for mine, other in dict.fromkeys(_computed_in(pair) for pair, _ in pieces):
        known = torch_dtype(mine), torch_dtype(other)
        if mine != other and all(each is not None and each.is_floating_point for each in known):
            yield f"dtype ({mine} against {other})"


def _made_apart(a: Run, b: Run) -> Iterator[str]:
    """What two captures say that they were made with, where that is not the same."""
    sides = [dict(run.document.get("versions") or {}) for run in (a, b)]
    for name in {**sides[0], **sides[1]}:
        if sides[0].get(name) != sides[1].get(name):
            yield f"{name} ({sides[0].get(name, 'none')} against {sides[1].get(name, 'none')})"
    yield from settings_apart(a, b)
    ways = [run.config.get("compiled") for run in (a, b)]
    if None not in ways and ways[0] != ways[1]:
        yield f"how compiled code is captured ({ways[0]} against {ways[1]}; it may round otherwise)"
    if a.document.get("host") != b.document.get("host"):
        yield "the host"


def other_batches(pieces: Sequence[tuple[Pair, Pieces]]) -> bool:
    """Whether rows that belong together were computed among others."""
    return any(
        sides[0].rows is not None and pair.a.records[0]["shape"] != pair.b.records[0]["shape"]
        for pair, sides in pieces
    )


def _computed_in(pair: Pair) -> tuple[str, str]:
    """The dtypes that both sides had before ``store_dtype``."""
    a, b = (
        str(each.get("converted_from") or each["dtype"]) for each in (pair.a.records[0], pair.b.records[0])
    )
    return a, b


def _is_given(result: TensorResult) -> bool:
    """Whether a tensor is an argument of the model itself."""
    return result.module == "" and result.direction == "inputs"
