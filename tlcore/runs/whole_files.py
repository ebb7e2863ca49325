"""A run's files taken to another place as they are, and checked there: rewriting would change nothing."""

from __future__ import annotations

from collections.abc import Callable

from ..alike import SupportsTakenFiles, SupportsWholeFiles
from ..engine.run_documents import RunDocuments
from ..errors import BackendError, ReadError, VerifyError
from ..protocols import Sink
from ..reader import Run
from ..reader.stored import Stored
from ..reader.verify import verify_steps
from ..storage import SupportsFiles, SupportsPutFile


def would_take(source: Run, sink: Sink) -> bool:
    """Whether a sink's place may have the files of a run on this machine as they are."""
    return (
        source.stored.is_local
        # A step that is not whole is left out.
        and not source.incomplete_steps
        and isinstance(source.stored.source, SupportsWholeFiles)
        and isinstance(sink, SupportsTakenFiles)
        and sink.would_take(source.stored.source)
    )


def take_rank(source: Run, documents: RunDocuments, on_tensors: Callable[[int], None]) -> None:
    """Copy all files of a rank; the last one is rank 0, with which all are checked.

    Raises ReadError, VerifyError or BackendError.
    """
    documents.open()
    run, store = documents.run, documents.run.store
    assert isinstance(store, SupportsPutFile)
    whole = False
    try:
        _copy_files(source, run.rank, store)
        if run.rank == 0:
            # Still running: what is there is listed, and not only believed.
            copied = Stored(store, {**run.document, "state": "running"})
            _, bad = verify_steps(copied, lambda: on_tensors(1))
            if bad:
                raise VerifyError(bad)
        run.ledger.add(source.ledger_of(run.rank))
        whole = True
    finally:
        documents.close(whole)


def _copy_files(source: Run, rank: int, target: SupportsPutFile) -> None:
    stored = source.stored
    assert isinstance(stored.store, SupportsFiles)
    assert isinstance(stored.source, SupportsWholeFiles)
    for name in dict.fromkeys(stored.source.whole_files(rank)):
        try:
            file = stored.store.open_file(name)
        except (BackendError, OSError) as error:
            raise ReadError(f"{source.url}/{name}: cannot be read: {error}") from error
        with file:
            target.put_file(name, file)
