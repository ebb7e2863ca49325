"""What each row of each layer should be, and how far it is from all others.

A causal model's row is told by the tokens up to it: requests that begin alike have rows in common, and these
are one row here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

Tokens = tuple[int, ...]
# Rows that are held against all others at a time.
_BATCH = 512
# By how much of the squares of both lengths a squared distance in float32 may be wrong.
_ROUNDING = 1e-5


class Place(NamedTuple):
    """A row of a layer: the ``layer``'s number and the ``tokens`` that led to it."""

    layer: int
    tokens: Tokens


class Reference:
    """The rows of each layer for some sequences of tokens."""

    def __init__(self, sequences: Sequence[Sequence[int]], layers: Mapping[int, torch.Tensor]) -> None:
        """``layers`` have, by number, a row for each token of each sequence, one sequence after the other."""
        self._rows: dict[Tokens, int] = {}
        chosen: list[int] = []
        begin = 0
        for tokens in map(tuple, sequences):
            for end in range(1, len(tokens) + 1):
                if tokens[:end] not in self._rows:
                    self._rows[tokens[:end]] = len(chosen)
                    chosen.append(begin + end - 1)
            begin += len(tokens)
        self._prefixes = list(self._rows)
        self.numbers = sorted(layers)
        self._layers = {number: place for place, number in enumerate(self.numbers)}
        wrong = {number: len(each) for number, each in layers.items() if len(each) != begin}
        if wrong:
            raise ValueError(f"{begin} tokens, but layers have rows: {wrong}")
        self._all = torch.stack([layers[number][chosen].float() for number in self.numbers])

    def of(self, place: Place) -> torch.Tensor | None:
        """What the row should be; None where these tokens are in no sequence."""
        row = self._rows.get(place.tokens)
        return None if row is None else self._all[self._layers[place.layer], row]

    def nearer(self, place: Place, error: float) -> bool:
        """Whether what is ``error`` from its own row is certainly nearer to that than to any other one."""
        gap = float(self._gaps[self._layers[place.layer], self._rows[place.tokens]])
        # Any other row is at least the gap, less the error, away.
        return 2 * error < gap

    def nearest(self, row: torch.Tensor) -> Place:
        """The row of all layers that ``row`` is nearest to."""
        distances = (self._all.double() - row.double()).square().sum(-1)
        found = int(distances.argmin())
        layer, index = divmod(found, len(self._prefixes))
        return Place(self.numbers[layer], self._prefixes[index])

    @cached_property
    def _gaps(self) -> torch.Tensor:
        """A lower bound of each row's distance from the nearest other one, of all layers."""
        flat = self._all.flatten(0, 1)
        squares = flat.square().sum(-1)
        found = []
        for begin in range(0, len(flat), _BATCH):
            own = squares[begin : begin + _BATCH, None]
            both = own + squares
            distances = both - 2 * (flat[begin : begin + _BATCH] @ flat.T) - _ROUNDING * both
            itself = torch.arange(len(own))
            distances[itself, begin + itself] = torch.inf
            found.append(distances.amin(-1).clamp(min=0).sqrt())
        return torch.cat(found).view(self._all.shape[:2])
