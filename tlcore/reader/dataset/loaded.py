"""Items in memory, to be handed out in another order than they were read in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .reading import Batch, new_tensor
from .tokens import Numbers

if TYPE_CHECKING:
    from .dataset import RowDataset


class Loaded:
    """Items in memory. ``items`` are sorted, and at ``places`` of them are those that were asked for."""

    def __init__(self, data: RowDataset, rows: Batch, items: Numbers, places: Numbers) -> None:
        self._data, self._rows, self._items, self._places = data, rows, items, places
        self._counts = data.counts_of(items)
        self._ends = np.cumsum(self._counts)

    def take(self, begin: int, end: int) -> list[Batch] | Batch:
        """Those asked for at ``[begin, end)``: one dictionary, of items of different length several."""
        places = self._places[begin:end]
        if self._data.ragged:
            return [self._one(place) for place in places.tolist()]
        return self._data.stacked(self._gathered(places), end - begin)

    def several(self, chosen: Numbers) -> list[Batch]:
        """Those asked for at these places, in memory of their own."""
        places = self._places[chosen]
        return self._data.split(self._items[places], self._gathered(places))

    def one(self, place: int) -> Batch:
        """The one that was asked for at a place."""
        return self._one(int(self._places[place]))

    def view(self, place: int) -> Batch:
        """The same, in the memory of all of them."""
        return self._view(int(self._places[place]))

    def _gathered(self, places: Numbers) -> Batch:
        """The rows of items, one item after the other."""
        rows = places
        if self._ends[-1] != len(self._ends):
            counts = self._counts[places]
            ends = np.cumsum(counts)
            begins = self._ends[places] - counts
            rows = np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1])
        return {name: _selected(values, rows) for name, values in self._rows.items()}

    def _one(self, at: int) -> Batch:
        # Of its own memory: what is kept of an item must not keep the others.
        return {name: values.clone() for name, values in self._view(at).items()}

    def _view(self, at: int) -> Batch:
        end = int(self._ends[at])
        own = slice(end - int(self._counts[at]), end)
        return self._data.item({name: values[own] for name, values in self._rows.items()})


def _selected(values: torch.Tensor, rows: Numbers) -> torch.Tensor:
    """Rows by number. One thread copies them: torch's own wait for each other, longest on a busy machine."""
    target = new_tensor((len(rows), *values.shape[1:]), values.dtype)
    if target.numel():
        # Without a mode that cannot fail NumPy copies twice.
        np.take(_as_bytes(values), rows, out=_as_bytes(target), mode="clip")
    return target


def _as_bytes(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """Each row as one value of so many bytes, in the same memory."""
    rows = values.view(-1).view(torch.uint8).numpy()
    return rows.view(f"V{rows.size // len(values)}")
