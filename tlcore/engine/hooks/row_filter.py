"""Leaving out rows of a step's tensors before anything is copied: only those of chosen requests or tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..filters.tensors import Outcome
from .collector import Collector, Taken

ROWS_UNKNOWN = Outcome("skipped", "rows of the requests unknown")


class Cut:
    """Which rows a step's tensors keep.

    ``kept`` are (first row, number of rows) of the tokens to keep, out of ``tokens`` rows that ``padded``
    further ones may follow. ``requests`` are the positions in the batch of the chosen ones among ``batch``
    requests, for tensors that have a row for each request.
    """

    def __init__(
        self, kept: Sequence[tuple[int, int]], tokens: int, padded: int, requests: Sequence[int], batch: int
    ) -> None:
        self._tokens = _Rows([row for first, count in kept for row in range(first, first + count)])
        self._requests = _Rows(requests)
        self._lengths = (tokens, tokens + padded)
        self._batch = batch

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's rows that are kept; the tensor itself where its first dimension counts neither."""
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.dim() == 0:
            return tensor
        length = tensor.shape[0]
        if length in self._lengths:
            return self._tokens.of(tensor)
        if length == self._batch and not (tensor.dim() == 2 and _counts(tensor, self._lengths)):
            return self._requests.of(tensor)
        return tensor


def _counts(tensor: torch.Tensor, lengths: tuple[int, int]) -> bool:
    """Whether this is (3, tokens) whole numbers, multimodal positions: the 3 are no requests."""
    return tensor.shape[1] in lengths and not (tensor.is_floating_point() or tensor.is_complex())


class _Rows:
    """Row numbers in ascending order, as a range where they are one."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = list(rows)
        first = self._rows[0] if self._rows else 0
        self._one_range = self._rows == list(range(first, first + len(self._rows)))
        self._first = first
        self._on: dict[torch.device, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._one_range:
            return tensor[self._first : self._first + len(self._rows)]
        index = self._on.get(tensor.device)
        if index is None:
            index = self._on[tensor.device] = torch.tensor(self._rows, device=tensor.device)
        return tensor.index_select(0, index)


class CuttingCollector(Collector):
    """A collector that keeps only the rows that the step's `Cut` says.

    ``find_cut`` is called at the step's first tensor, when the batch is known. Where it cannot say (it
    returns None), nothing of the step is stored: rows of requests that were not chosen must not be.
    """

    find_cut: Callable[[], Cut | None] = staticmethod(lambda: None)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._cut: Cut | None = None
        self._looked = False

    def begin_step(self, step: int) -> None:
        """Begin a step, and forget the one before."""
        super().begin_step(step)
        self._cut, self._looked = None, False

    def tensor(self, tensor: torch.Tensor) -> None:
        """Take the kept rows of one tensor."""
        cut = self._step_cut()
        if cut is not None:
            super().tensor(cut(tensor))
            return
        self._add(self._without_rows(tensor))

    def take(self, tensor: torch.Tensor) -> Taken:
        """Copy the kept rows of one tensor, for a side that is added later."""
        cut = self._step_cut()
        if cut is not None:
            return super().take(cut(tensor))
        return self._without_rows(tensor)

    def _without_rows(self, tensor: torch.Tensor) -> Taken:
        return self.without_copy(self._forms.find(tensor).refused(ROWS_UNKNOWN))

    def _step_cut(self) -> Cut | None:
        if not self._looked:
            self._looked = True
            self._cut = self.find_cut()
        return self._cut
