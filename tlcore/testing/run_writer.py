"""A sink between what the engine writes before and after it, for tests that have no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engine.new_run import layout_of
from ..engine.run_documents import RunDocuments, close_run
from ..protocols import Sink, SupportsLateCommit
from ..record import Record, RunInfo, StepSummary
from ..storage import Location
from .samples import make_run


class RunWriter:
    """A run at ``url`` that is written through ``sink``; ``backend`` is the name that its readers look for.

    ``run`` is made by `make_run` where none is given. The rest of a sink's calls are the sink's own.
    """

    def __init__(
        self,
        sink: Sink,
        url: str | Path = "",
        backend: str = "pt",
        run: RunInfo | None = None,
        location: Location | None = None,
    ) -> None:
        made = run or make_run(url, layout=layout_of(sink))
        made.document.update(backend=backend, layout=layout_of(sink))
        self._documents = RunDocuments(made, location or Location(made.url))
        self._documents.open()
        self.run = self._documents.run
        self.sink = sink
        sink.open(self.run)
        if isinstance(sink, SupportsLateCommit):
            sink.tell_stored(lambda step, error: None)

    def write(self, batch: Sequence[Record]) -> None:
        """As the sink does."""
        self.sink.write(batch)

    def commit_step(self, step: StepSummary) -> None:
        """As the sink does; what is booked in ``run.ledger`` is the caller's affair."""
        self.sink.commit_step(step)

    def close(self) -> None:
        """Close the sink, then end the run."""
        close_run(self.sink, self._documents)
