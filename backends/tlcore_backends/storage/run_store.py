"""The store that a sink writes into."""

from __future__ import annotations

from tlcore.errors import BackendError
from tlcore.record import RunInfo
from tlcore.storage import Store


def store_of(run: RunInfo) -> Store:
    """The run's opened store. Raises BackendError for a run that was not opened by the engine."""
    if run.store is None:
        raise BackendError(f"the run {run.shown_url} has no open store; the engine opens it")
    return run.store
