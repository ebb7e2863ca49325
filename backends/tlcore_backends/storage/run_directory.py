"""What every format writes alike in a run's directory: ``run.json``, close markers, ``step.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from tlcore.errors import BackendError
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.templates import readable
from tlcore.protocols import Store
from tlcore.record import Json, RunInfo

from .local import LocalStore
from .open import Limits, open_store
from .spill.store import SpillStore

_RUN_FILE = "run.json"
_WRITTEN_BY_OTHER_RANKS = re.compile(r"(step_\d+/.*|close_rank_\d+\.json)", re.DOTALL)


class RunDirectory:
    """The directory ``run.url`` as one rank writes it; ``backend`` is the format's name.

    On the local disk it is made with mode 0700, or accepted if it is empty or already holds this run.
    In object storage nothing is read: a role that may only write is enough.
    """

    def __init__(
        self,
        run: RunInfo,
        backend: str,
        storage_options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.run = run
        self.suffix = rank_suffix(run.rank)
        self._place = open_store(run.url, storage_options, run.fsync, limits)
        self.store: Store = SpillStore(self._place, run, run.spill) if run.spill is not None else self._place
        self._backend = backend

    def open(self) -> None:
        """Make the directory and, on rank 0, its ``run.json``.

        Raises BackendError when the directory cannot be made or written, or holds something else.
        """
        if isinstance(self._place, LocalStore):
            self._place.prepare()
            self._refuse_foreign_directory()
        if self.run.rank == 0:
            self._put_run_document("running", closed=None)

    @property
    def waiting(self) -> str | None:
        """What of the run waits elsewhere to be delivered, in words."""
        return self.store.waiting if isinstance(self.store, SpillStore) else None

    def put_step(self, step: int, text: str) -> None:
        """Write the ``step.json`` that commits a step of this rank."""
        self.put(f"{step_dir(step)}/step{self.suffix}.json", text)

    def put(self, name: str, text: str) -> None:
        """Write a text file."""
        self.store.put(name, [text.encode("utf-8")])

    def ranked(self, structure: str) -> str:
        """The name of a structure file as this rank writes it."""
        return f"{structure.removesuffix('.json')}{self.suffix}.json"

    def close(self) -> None:
        """Rank 0 marks ``run.json`` complete; every other rank leaves its own close marker."""
        try:
            self._put_end(datetime.now(timezone.utc).isoformat())
        finally:
            # Also when the end cannot be written: what was spilled before may still be delivered.
            self.store.close()

    def _put_end(self, closed: str) -> None:
        if self.run.rank == 0:
            self._put_run_document("complete", closed)
        else:
            marker = {"rank": self.run.rank, "closed": closed, "ledger": self._ledger()}
            self.put(f"close{self.suffix}.json", readable(marker))

    def _refuse_foreign_directory(self) -> None:
        """Raise BackendError unless the directory is empty or holds (the ranks of) this very run."""
        names = [entry.name for entry in self.store.list()]
        if _RUN_FILE in names:
            owner = self._owner()
            if owner != self.run.run_id:
                raise BackendError(f"{self.store.url} already holds run {owner!r}; every run needs its own")
        elif foreign := [name for name in names if not _WRITTEN_BY_OTHER_RANKS.fullmatch(name)]:
            raise BackendError(f"{self.store.url} holds {foreign[0]!r} and no run.json; it must be empty")

    def _owner(self) -> str | None:
        try:
            document = json.loads(self.store.get(_RUN_FILE))
        except ValueError:
            return None
        return document.get("run_id") if isinstance(document, dict) else None

    def _put_run_document(self, state: str, closed: str | None) -> None:
        stated = {"state": state, "closed": closed, "backend": self._backend, "ledger": self._ledger()}
        text = readable({**self.run.document, **stated})
        try:
            self.put(_RUN_FILE, text)
        except BackendError:
            # A full disk has no room for another file, but what became of the run must be told.
            store = self.store
            if closed is None or not isinstance(store, LocalStore) or not store.overwrite(_RUN_FILE, text):
                raise

    def _ledger(self) -> Json:
        return self.run.ledger.snapshot().to_json()
