"""The ``pt`` backend: the documented tree, one ``.pt`` file a tensor, on the local disk or at a URL."""

from __future__ import annotations

from collections.abc import Sequence

from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.templates import quoted, structures_of
from tlcore.record import Record, RunInfo, StepSummary

from ..storage.run_store import store_of
from ..storage.uploads import Uploads
from .encode import encode, file_bytes


class PtSink:
    """Writes each record as ``<logical name>.pt``; identical tensors of a step are copies of one file.

    On the local disk such a copy is a hard link, in object storage the server makes it, and many files
    travel at once.
    """

    def open(self, run: RunInfo) -> None:
        """Begin to write into ``run.store``."""
        self._store = store_of(run)
        self._suffix = rank_suffix(run.rank)
        self._uploads = Uploads(self._store)
        self._begin_step(None)

    def write(self, batch: Sequence[Record]) -> None:
        """Write records of one step; a record that repeats an earlier one becomes another name of it."""
        copies: list[tuple[str, str]] = []
        try:
            for record in batch:
                if record.step != self._step:
                    self._begin_step(record.step)
                self._write_record(record, copies)
        finally:
            # The records' memory is used again once this returns, so nothing may be on its way then;
            # and a copy needs its original.
            self._uploads.wait()
        for source, target in copies:
            self._uploads.copy(source, target)
        self._uploads.wait()

    def commit_step(self, step: StepSummary) -> None:
        """Write the step's structures, its call order, and last its ``step.json``."""
        if step.step != self._step:
            self._begin_step(step.step)
        directory = step_dir(step.step)
        structures = structures_of(directory, step.structures)
        for name in structures:
            self._put(f"{directory}/{self._ranked(name)}", structures.readable(name))
        calls = "".join(f"{call}\n" for call in step.calls)
        self._put(f"{directory}/module_calls{self._suffix}.txt", calls)
        self._uploads.wait()
        text = step.to_text(self._entries).encode("utf-8")
        self._store.put(f"{directory}/step{self._suffix}.json", [text])
        self._begin_step(None)

    def close(self) -> None:
        """End the threads."""
        self._uploads.close()

    def _ranked(self, structure: str) -> str:
        """The name of a structure file as this rank writes it."""
        return f"{structure.removesuffix('.json')}{self._suffix}.json"

    def _begin_step(self, step: int | None) -> None:
        self._step = step
        self._entries: list[str] = []
        self._sizes: dict[str, int] = {}

    def _write_record(self, record: Record, copies: list[tuple[str, str]]) -> None:
        file = f"{record.name}.pt"
        size = self._sizes.get(record.alias_of) if record.alias_of is not None else None
        if size is not None:
            copies.append((f"{record.alias_of}.pt", file))
        else:
            # Its original was not stored, so this record stands for itself.
            record = record._replace(alias_of=None)
            dtype, shape, data = record.dtype, record.shape, record.data
            size = file_bytes(dtype, shape)
            # Encoded where it is written, since its checksum takes longer than the writing.
            self._uploads.run(lambda: self._store.put(file, encode(dtype, shape, data)))
        self._sizes[record.name] = size
        self._entries.append(f'{record.entry_text()},"file":{quoted(file)},"file_bytes":{size}}}')

    def _put(self, name: str, text: str) -> None:
        self._uploads.put(name, [text.encode("utf-8")])
