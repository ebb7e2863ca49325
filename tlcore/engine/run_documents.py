"""What the engine itself writes into a run, whatever the backend: ``run.json`` and close markers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from datetime import datetime, timezone

from .. import registry
from ..errors import BackendError
from ..layout.checksums import with_checksum
from ..layout.names import rank_suffix
from ..layout.run_files import REMARKS, RUN_FILE
from ..layout.templates import readable
from ..protocols import Sink
from ..record import Json, RunInfo
from ..storage import (
    Location,
    Store,
    SupportsFiles,
    SupportsOverwrite,
    SupportsPrepare,
    SupportsRemoval,
    SupportsWaiting,
)

_WRITTEN_BY_OTHER_RANKS = re.compile(r"step_\d+/.*|.*rank_\d+.*", re.DOTALL)


class RunDocuments:
    """The store of a run while one rank writes it, and the documents that say whose it is and how it ended.

    `run` is the run with its store opened. On a disk of this machine its directory is made with mode 0700,
    or accepted if it is empty or holds what other ranks have written of this run. In object storage nothing
    is read: a role that may only write is enough.
    """

    def __init__(self, run: RunInfo, location: Location) -> None:
        self._store = registry.open_store(dataclasses.replace(location, url=run.url, fsync=run.fsync))
        store = self._store if run.spill is None else registry.spilling(self._store, run)
        self.run = dataclasses.replace(run, store=store)
        self._all: Store = store

    def open(self) -> None:
        """Make the directory and, on rank 0, its ``run.json``: the probe that the place can be written.

        Raises BackendError when it cannot be, or holds something else.
        """
        if isinstance(self._store, SupportsPrepare):
            self._store.prepare()
        if isinstance(self._store, SupportsFiles):
            self._refuse_foreign_directory()
        if self.run.rank == 0:
            self._put_run_document("running", closed=None)

    @property
    def waiting(self) -> str | None:
        """What of the run waits elsewhere to be delivered, in words."""
        return self._all.waiting if isinstance(self._all, SupportsWaiting) else None

    def close(self, whole: bool = True) -> None:
        """Rank 0 marks ``run.json`` complete, any other rank leaves its close marker; the store is closed.

        A run that is not ``whole`` (its sink could not be closed) gets no mark. Raises BackendError when the
        mark cannot be written.
        """
        try:
            if whole:
                self._put_end(datetime.now(timezone.utc).isoformat())
        finally:
            # Also when the end cannot be written: what was spilled before may still be delivered.
            self._all.close()

    def abandon(self) -> None:
        """Take back what `open` wrote: the run never began."""
        with contextlib.suppress(BackendError, OSError):
            if self.run.rank == 0:
                self._all.delete(RUN_FILE)
            if isinstance(self._store, SupportsRemoval) and not any(True for _ in self._store.list()):
                self._store.remove_root()
        self._all.close()

    def _put_end(self, closed: str) -> None:
        if self.run.rank == 0:
            self._put_run_document("complete", closed)
        else:
            marker = {"rank": self.run.rank, "closed": closed, "ledger": self._ledger()}
            self._put(f"close{rank_suffix(self.run.rank)}.json", with_checksum(readable(marker)))

    def _refuse_foreign_directory(self) -> None:
        """Raise BackendError unless the directory is empty or holds (the ranks of) this very run."""
        names = [entry.name for entry in self._all.list()]
        if RUN_FILE in names:
            owner = self._owner()
            # Who writes rank 0 a second time would write over what is committed.
            if owner != self.run.run_id or self.run.rank == 0:
                raise BackendError(f"{self._all.url} already holds run {owner!r}; every run needs its own")
        elif foreign := [name for name in names if not _WRITTEN_BY_OTHER_RANKS.fullmatch(name)]:
            raise BackendError(f"{self._all.url} holds {foreign[0]!r} and no run.json; it must be empty")

    def _owner(self) -> str | None:
        try:
            document = json.loads(self._all.get(RUN_FILE))
        except ValueError:
            return None
        return document.get("run_id") if isinstance(document, dict) else None

    def _put_run_document(self, state: str, closed: str | None) -> None:
        document = {**self.run.document, "state": state, "closed": closed, "ledger": self._ledger()}
        data = with_checksum(readable(document))
        try:
            self._put(RUN_FILE, data)
        except BackendError:
            # A full disk has no room for another file, but what became of the run must be told.
            store = self._all
            document.pop(REMARKS, None)
            if (
                closed is None
                or not isinstance(store, SupportsOverwrite)
                or not store.overwrite(RUN_FILE, with_checksum(readable(document)).decode("utf-8"))
            ):
                raise

    def _put(self, name: str, data: bytes) -> None:
        self._all.put(name, [data])

    def _ledger(self) -> Json:
        return self.run.ledger.snapshot().to_json()


def close_run(sink: Sink, documents: RunDocuments, whole: Callable[[], bool] = lambda: True) -> None:
    """Close a sink, then end its run: as ``whole``, or only left where closing the sink raised."""
    try:
        sink.close()
    except BaseException:
        documents.close(whole=False)
        raise
    documents.close(whole())
