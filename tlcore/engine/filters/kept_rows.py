"""The rows of a set that a step keeps: chosen when they are copied, and again once drafts are decided on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...layout.rows import RowSet, Span
from ...record import Json
from .tensors import TensorSpec, mover

Places = list[tuple[int, int]]


class WaitingSpec(TensorSpec):
    """The form of a tensor of ``rows`` of which some may have to go; as it was copied it is ``whole``."""

    __slots__ = ("rows", "whole")

    def __init__(self, whole: TensorSpec, rows: KeptRows) -> None:
        super().__init__(whole.dtype, whole.shape, whole.device, whole.nbytes, whole.kind, None)
        self.original, self.captured_bytes, self.shown = whole.original, whole.captured_bytes, whole.shown
        self.whole, self.rows = whole, rows


class KeptRows:
    """The rows of one set that are kept, in ascending order, as a range where they are one.

    ``chosen`` says of a span which are: the first, and how many. Where only rows of tokens that stay in their
    request are wanted (``sure``), those of drafts are kept until `settle`; till then the set ``waits``.
    ``lasts`` says of which requests only the last row is wanted.
    """

    def __init__(
        self,
        rows: RowSet,
        chosen: Callable[[Span], tuple[int, int] | None],
        lasts: Callable[[str], bool],
        sure: Callable[[str], bool],
    ) -> None:
        self.rows: list[Json] = []
        self._waiting: set[int] = set()
        places: list[int] = []
        final = {span.row["request_id"]: span for span in rows.spans}
        for span in rows.spans:
            request, found = span.row["request_id"], chosen(span)
            last = lasts(str(request))
            if found is None or (last and rows.grid is not None and final[request] is not span):
                continue
            begin, count = found
            row = _moved(span, begin - span.begin, count, len(places))
            if last and count > 1:
                row["undecided"] = True
            if sure(str(request)) and (row.get("drafts") or "accepted" in row):
                self._waiting.add(len(self.rows))
            self.rows.append(row)
            places += range(begin, begin + count)
        self._places = places
        self._first = places[0] if places else 0
        self._one_range = places == list(range(self._first, self._first + len(places)))
        self._on: dict[torch.device, torch.Tensor] = {}
        self._specs: dict[TensorSpec, WaitingSpec] = {}
        self._stayed: Places | None = None

    @property
    def waits(self) -> bool:
        """Whether some rows are to go once it is known which drafts stay in their requests."""
        return bool(self._waiting)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor whose first axis is theirs."""
        if self._one_range:
            return tensor[self._first : self._first + len(self._places)]
        index = self._on.get(tensor.device)
        if index is None:
            index = self._on[tensor.device] = torch.tensor(self._places, device=tensor.device)
        return tensor.index_select(0, index)

    def waiting(self, spec: TensorSpec) -> TensorSpec:
        """The form of a tensor of these rows, of which some may have to go before it is stored."""
        if spec.outcome is not None:
            return spec
        found = self._specs.get(spec)
        if found is None:
            found = self._specs[spec] = WaitingSpec(spec, self)
        return found

    def settle(self) -> None:
        """Leave out the rows whose tokens did not stay, now that ``rows`` say so (`tlcore.layout.drafts`).

        Where nobody has said so, the drafts' rows stay, and ``rows`` go on saying that they are drafts.
        """
        if not self.waits or self._stayed is not None:
            return
        stayed: Places = []
        settled: list[Json] = []
        count = 0
        for place, row in enumerate(self.rows):
            decided = place in self._waiting and "drafts" not in row
            span = Span(row, row["first_row"], row["rows"], row.get("first_position"))
            if decided:
                span = span.kept()
            if not span.length:
                continue
            stayed.append((span.begin, span.length))
            settled.append(_settled(span, count) if decided else {**row, "first_row": count})
            count += span.length
        self.rows[:], self._stayed = settled, stayed

    def gather(self, address: int, spec: TensorSpec) -> TensorSpec:
        """Move the rows that stay together where a tensor's copy lies; the form that it has then.

        Nothing is moved before `settle`.
        """
        if self._stayed is None:
            return spec
        width = spec.nbytes // max(1, len(self._places))
        end = 0
        for begin, count in self._stayed:
            if begin != end and width:
                # The memory that they move to may be partly their own.
                mover(count * width)(address + end * width, address + begin * width, count * width)
            end += count
        return spec.of_rows(end)


def _settled(span: Span, first_row: int) -> Json:
    row: Json = {**span.row, "first_row": first_row, "rows": span.length, "accepted": span.length}
    if span.first is not None:
        row["first_position"] = span.first
    if "last" in row:
        row["last"] = span.length - 1
    return row


def _moved(span: Span, skipped: int, count: int, first_row: int) -> Json:
    """A span's row without its first ``skipped`` ones, of which ``count`` stay, from ``first_row`` on."""
    row: dict[str, Any] = {**span.row, "first_row": first_row, "rows": count}
    if span.first is not None:
        row["first_position"] = span.first + skipped
    if "accepted" in row:
        row["accepted"] = min(count, max(0, row["accepted"] - skipped))
    if row.get("drafts"):
        # The last ones of the span are drafts, of which some may be left out before, and some behind.
        first_draft = span.length - row["drafts"]
        row["drafts_before"] = min(row["drafts"], max(0, skipped - first_draft))
        row["drafts"] = max(0, skipped + count - max(skipped, first_draft))
    return row
