"""What a session injects, made only where it does: it loads the reader, which writing does not need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..config.configuration import Config
from ..record import RunInfo
from .filters.rows import StepRows

if TYPE_CHECKING:
    from .injection import Injection
    from .row_injection import RowInjection


def injected(
    config: Config, run: RunInfo, rows: StepRows, of_requests: bool
) -> tuple[RunInfo, Injection | None, RowInjection | None]:
    """The run, marked where anything is injected, what injects, and that again where it does so row by row.

    Raises as `Injection` and `RowInjection` do.
    """
    if config.inject is None:
        return run, None, None
    from .injection import CallInjection
    from .row_injection import RowInjection

    by_row = RowInjection(config.inject, run, rows) if of_requests else None
    injection: Injection = by_row or CallInjection(config.inject)
    return replace(run, document={**run.document, "injected": injection.document}), injection, by_row
