"""The ``pt`` backend: the documented tree, one ``.pt`` file a tensor, on the local disk or at a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tlcore.names import step_dir
from tlcore.record import Json, Record, RunInfo, StepSummary

from .pt_format import encode
from .run_directory import RunDirectory, readable
from .uploads import Uploads


class PtSink:
    """Writes each record as ``<logical name>.pt``; identical tensors of a step are copies of one file.

    On the local disk such a copy is a hard link, in object storage the server makes it, and many files
    travel at once. ``storage_options`` go to the fsspec filesystem when the run lies at a URL.
    """

    def __init__(self, storage_options: Mapping[str, Any] | None = None) -> None:
        self._storage_options = storage_options

    def open(self, run: RunInfo) -> None:
        """Make the run's directory and, on rank 0, its ``run.json``.

        Raises BackendError when the directory cannot be made or written, or holds something else.
        """
        self._directory = RunDirectory(run, "pt", self._storage_options)
        self._uploads = Uploads(self._directory.store)
        self._begin_step(None)
        self._directory.open()

    def write(self, batch: Sequence[Record]) -> None:
        """Write records of one step; a record that repeats an earlier one becomes another name of it."""
        copies: list[tuple[str, str]] = []
        for record in batch:
            if record.step != self._step:
                self._begin_step(record.step)
            if record.alias_of in self._entries:
                copies.append((self._entries[record.alias_of]["file"], f"{record.name}.pt"))
                self._entries[record.name] = record.describe()
            else:
                self._write_record(record)
        # A copy needs its original, which may still be on its way.
        self._finish_writes()
        for source, target in copies:
            self._uploads.copy(source, target)
        self._uploads.wait()

    def commit_step(self, step: StepSummary) -> None:
        """Write the step's structures, its call order, and last its ``step.json``."""
        if step.step != self._step:
            self._begin_step(step.step)
        directory = step_dir(step.step)
        for name, structure in step.structures.items():
            self._put(f"{directory}/{self._directory.ranked(name)}", readable(structure))
        calls = "".join(f"{call}\n" for call in step.calls)
        self._put(f"{directory}/module_calls{self._directory.suffix}.txt", calls)
        self._uploads.wait()
        self._directory.put_step(step.step, step.to_json(self._placed()))
        self._begin_step(None)
