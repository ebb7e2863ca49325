"""Leaving out rows of a step's tensors before anything is copied: only those of chosen requests or tokens."""

from __future__ import annotations

from typing import Any

import torch

from ...ledger import ROWS_UNKNOWN
from ..filters.rows import StepRows
from .collector import Collector, Taken


class CuttingCollector(Collector):
    """A collector that keeps only the rows that the step's `StepRows` says.

    Where it cannot say whose a tensor's rows are, nothing of it is stored: rows of requests that were not
    chosen must not be.
    """

    def __init__(self, rows: StepRows, *args: Any) -> None:
        super().__init__(*args)
        self._rows = rows

    def tensor(self, tensor: torch.Tensor) -> None:
        """Take the kept rows of one tensor."""
        kept = self._rows.cut(tensor)
        if kept is not None:
            super().tensor(kept)
            return
        self._add(self._without_rows(tensor))

    def take(self, tensor: torch.Tensor) -> Taken:
        """Copy the kept rows of one tensor, for a side that is added later."""
        kept = self._rows.cut(tensor)
        return self._without_rows(tensor) if kept is None else super().take(kept)

    def _without_rows(self, tensor: torch.Tensor) -> Taken:
        return self.without_copy(self._forms.find(tensor).refused(ROWS_UNKNOWN))
