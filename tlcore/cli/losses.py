"""What a run lost while it was captured, told wherever a run is summed up. A skipped tensor is no loss."""

from __future__ import annotations

from ..errors import ReadError
from ..ledger import Counts
from ..reader import Run, RunSummary


def losses_of(opened: Run) -> str | None:
    """A sentence about what the run's ledger counts as dropped or failed; None where it counts nothing."""
    try:
        return sentence(opened.ledger)
    except ReadError:
        # What else is asked of the run can be answered without it; `verify` says what is damaged.
        return "its ledger cannot be read"


def sentence(counts: Counts) -> str | None:
    """``at capture 174 of 180 tensors failed and are not in the run``; None where none was lost."""
    of_all = f"of {counts.captured} tensors"
    lost = ((counts.dropped, "were dropped"), (counts.failed, "failed"))
    parts = [f"{count} {of_all} {how}" for count, how in lost if count]
    return f"at capture {' and '.join(parts)} and are not in the run" if parts else None


def cell(counts: RunSummary) -> str | None:
    """The same for a table: ``174 failed of 180``."""
    lost = ((counts.dropped, "dropped"), (counts.failed, "failed"))
    shown = ", ".join(f"{count} {how}" for count, how in lost if count)
    return f"{shown} of {counts.captured}" if shown else None
