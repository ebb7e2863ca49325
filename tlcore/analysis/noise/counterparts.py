"""What further runs of the reference hold of the tensors that two runs were compared by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..matching.pairs import Located, Pair, Piece

Pieces = tuple[Piece, Piece]


@dataclass(frozen=True, slots=True)
class Counterpart:
    """Rows of the reference's tensor and the same rows in the further run of number ``run``."""

    run: int
    pair: Pair
    pieces: Pieces


class Counterparts:
    """Finds a tensor of the reference in its further runs, by its name and rows."""

    def __init__(self, matched: Sequence[Sequence[Pair]]) -> None:
        """Take the pairs of the reference with each further run."""
        self._runs: list[dict[tuple[int, str], list[tuple[Pair, Pieces]]]] = []
        for pairs in matched:
            found: dict[tuple[int, str], list[tuple[Pair, Pieces]]] = defaultdict(list)
            for pair in pairs:
                for pieces in pair.pieces:
                    found[pair.a.step, pair.a.names[0]].append((pair, pieces))
            self._runs.append(found)

    def of(self, pair: Pair, piece: Piece) -> Iterator[Counterpart]:
        """The counterparts of one piece of the reference's side of a pair."""
        for run, found in enumerate(self._runs):
            for first, pieces in found.get((pair.a.step, pair.a.names[0]), ()):
                common = _common(piece, pieces)
                others = [self._beside(found, first, name, pair) for name in pair.a.names[1:]]
                if common is None or first.a.unshard != pair.a.unshard or None in others:
                    continue
                parts = [first, *(each for each in others if each is not None)]
                yield Counterpart(run, Pair(pair.key, pair.a, _together(parts, pair), (common,)), common)

    @staticmethod
    def _beside(
        found: dict[tuple[int, str], list[tuple[Pair, Pieces]]], first: Pair, name: str, pair: Pair
    ) -> Pair | None:
        """The pair of another part of a sum, where it lies as the first part does."""
        for other, _ in found.get((pair.a.step, name), ()):
            if other.b.step == first.b.step and other.pieces == first.pieces:
                return other
        return None


def _together(parts: Sequence[Pair], pair: Pair) -> Located:
    first = parts[0].b
    names = tuple(name for part in parts for name in part.b.names)
    records = tuple(r for part in parts for r in part.b.records)
    return replace(first, names=names, records=records, columns=pair.a.columns)


def _common(piece: Piece, other: Pieces) -> Pieces | None:
    """The rows of the reference that are in ``piece`` and have a counterpart, on both sides."""
    mine, theirs = other
    if piece.rows is None:
        return other
    if mine.rows is None:
        return (piece, replace(piece, axis=theirs.axis or piece.axis)) if theirs.rows is None else None
    begin, end = max(piece.rows[0], mine.rows[0]), min(piece.rows[1], mine.rows[1])
    if piece.axis != mine.axis or begin >= end or theirs.rows is None:
        return None
    shift = theirs.rows[0] - mine.rows[0]
    return replace(piece, rows=(begin, end)), replace(theirs, rows=(begin + shift, end + shift))
