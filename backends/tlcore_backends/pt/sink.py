"""The ``pt`` backend: the documented tree, one ``.pt`` file a tensor, on the local disk or at a URL."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from tlcore.alike import AlikeStep
from tlcore.layout.checksums import digest_of_files, with_checksum
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.templates import quoted, structures_of
from tlcore.record import Origin, Record, RunInfo, StepSummary
from tlcore.storage import SupportsFiles, SupportsFolders

from ..storage.run_store import store_of
from ..storage.uploads import Uploads
from .behind import Behind
from .encode import encode, file_bytes
from .one_step import OneStep
from .travel import Stored, Travel, TravellingStep
from .whole_steps import Pattern, Written, pattern_of

_QUEUE_BYTES = 1 << 30
_MOST_REMEMBERED = 16
# Tensors in all of them together: their names take memory that a capture of large steps would rather have.
_MOST_TENSORS = 1 << 16


class PtSink:
    """Writes each record as ``<logical name>.pt``; identical tensors of a step are copies of one file.

    On the local disk such a copy is a hard link. In object storage the server makes it; many files, also of
    steps that follow each other, travel at once, and a step is stored when its ``step.json`` is there.
    """

    alike_in_capture: bool = False

    def __init__(self) -> None:
        self._stored: Stored = lambda step, error: None

    def tell_stored(self, stored: Stored) -> None:
        """Have ``stored(step, error)`` called, in any thread, once for each step that was accepted."""
        self._stored = stored

    def open(self, run: RunInfo) -> None:
        """Begin to write into ``run.store``."""
        self._store = store_of(run)
        self._suffix = rank_suffix(run.rank)
        self._travel: Travel | None = None
        self._uploads: Uploads | None = None
        self._behind: Behind | None = None
        self._rank = run.rank
        # Of two that publish the same directory, one fails.
        self.alike_in_capture = run.world_size == 1
        # The last steps, which others may be said to be like, and what those have in common.
        self._written: OrderedDict[int, Written] = OrderedDict()
        self._patterns: dict[int, Pattern | None] = {}
        self._remembered = 0
        if isinstance(self._store, SupportsFiles):
            self._uploads = Uploads(self._store)
            if run.queue_bytes is None:
                # Where a queue bounds all memory, none is kept beyond a call.
                self._behind = Behind(self._told)
        else:
            most_bytes = (run.queue_bytes or _QUEUE_BYTES) // 2
            self._travel = Travel(self._store, most_bytes, self._told, run.hold)
        self._begin_step(None)

    def _told(self, step: int, error: BaseException | None) -> None:
        self._stored(step, error)

    def write(self, batch: Sequence[Record]) -> None:
        """Write records of one step; a record that repeats an earlier one becomes another name of it."""
        copies: list[tuple[str, str]] = []
        self._settle()
        try:
            for record in batch:
                if record.step != self._step:
                    self._begin_step(record.step)
                self._write_record(record, copies)
        finally:
            # The records' memory is used again once this returns, so nothing may be on its way then;
            # and a copy needs its original.
            if self._uploads is not None:
                self._uploads.wait()
        if self._uploads is None:
            self._travelling.copies += copies
            return
        for source, target in copies:
            self._uploads.copy(source, target)
        self._uploads.wait()

    def commit_step(self, step: StepSummary) -> None:
        """Write the step's structures, its call order, and last its ``step.json``.

        On the local disk the step is stored on return.
        """
        self._settle()
        if step.step != self._step:
            self._begin_step(step.step)
        *texts, (end, document) = self._texts(step)
        for name, text in texts:
            self._put(name, text)
        if self._travel is not None:
            self._travel.commit(self._travelling, end, document)
        elif self._uploads is not None:
            self._uploads.wait()
            self._store.put(end, [document])
            self._stored(step.step, None)
        self._begin_step(None)

    def _texts(self, step: StepSummary) -> Iterator[tuple[str, bytes]]:
        """A step's structures, its call order, and last its ``step.json``."""
        directory = step_dir(step.step)
        structures = structures_of(directory, step.structures)
        texts = {f"{directory}/{self._ranked(each)}": structures.readable(each) for each in structures}
        files = {name: text.encode() for name, text in texts.items()}
        yield from files.items()
        calls = "".join(f"{call}\n" for call in step.calls)
        yield f"{directory}/module_calls{self._suffix}.txt", calls.encode()
        document = step.to_text(self._entries, {"structures_hash": quoted(digest_of_files(files))})
        yield f"{directory}/step{self._suffix}.json", with_checksum(document)
        if self._travel is None:
            self._remember(step.step, Written(self._tensors, structures, step.calls))

    def _remember(self, step: int, written: Written) -> None:
        self._forget(step)
        self._written[step] = written
        self._remembered += len(written.tensors)
        while len(self._written) > _MOST_REMEMBERED or self._remembered > _MOST_TENSORS:
            self._forget(next(iter(self._written)))

    def _forget(self, step: int) -> None:
        self._patterns.pop(step, None)
        if step in self._written:
            self._remembered -= len(self._written.pop(step).tensors)

    def write_alike(self, step: AlikeStep, summary: StepSummary) -> bool:
        """Write a step that is like one of the last, as one directory."""
        store, written = self._store, self._written.get(step.like)
        if written is None or not isinstance(store, SupportsFolders):
            return False
        if step.like not in self._patterns:
            self._patterns[step.like] = pattern_of(step.like, self._rank, written)
        self._written.move_to_end(step.like)
        pattern = self._patterns[step.like]
        finish = None if pattern is None else pattern.begin(store, step, summary)
        if finish is None:
            return False
        self._begin_step(None)
        if self._behind is None:
            finish()
            self._stored(step.step, None)
        else:
            self._behind.write(step.step, finish)
        return True

    def write_whole(self, batches: Iterable[Sequence[Record]], summary: StepSummary) -> bool:
        """Write a step as one directory, which no other rank has begun."""
        store, uploads, directory = self._store, self._uploads, step_dir(summary.step)
        folder = None
        self._settle()
        if uploads is not None and isinstance(store, SupportsFolders):
            folder = store.begin_folder(directory)
        if folder is None or uploads is None:
            return False
        self._begin_step(summary.step)
        step = OneStep(folder, uploads, f"{directory}/")
        known = partial(structures_of, directory, summary.structures)
        try:
            for batch in batches:
                step.add([record for record in map(self._noted, batch) if record.alias_of is None], known)
            for name, _, alias in self._tensors:
                if alias is not None:
                    step.link(alias, name)
            step.finish(list(self._texts(summary)))
        except BaseException:
            step.abandon()
            self._begin_step(None)
            raise
        self._stored(summary.step, None)
        self._begin_step(None)
        return True

    def flush(self) -> None:
        """Return when every step that was accepted is stored or has failed."""
        self._settle()
        if self._travel is not None:
            self._travel.wait()

    def _settle(self) -> None:
        """Return when a step that is written behind is: they are stored in their order."""
        if self._behind is not None:
            self._behind.wait()

    def close(self) -> None:
        """End the threads, when everything is there."""
        for each in (self._behind, self._uploads, self._travel):
            if each is not None:
                each.close()

    def _ranked(self, structure: str) -> str:
        """The name of a structure file as this rank writes it."""
        return f"{structure.removesuffix('.json')}{self._suffix}.json"

    def _begin_step(self, step: int | None) -> None:
        if self._travel is not None and step is not None:
            self._travel.room()
            self._travelling = TravellingStep(step)
        self._step = step
        self._entries: list[str] = []
        self._tensors: list[tuple[str, Origin, str | None]] = []
        self._sizes: dict[str, int] = {}

    def _write_record(self, record: Record, copies: list[tuple[str, str]]) -> None:
        record = self._noted(record)
        file = f"{record.name}.pt"
        if record.alias_of is not None:
            copies.append((f"{record.alias_of}.pt", file))
            return
        dtype, shape, data = record.dtype, record.shape, record.data
        if self._travel is not None:
            self._travel.put(self._travelling, file, b"".join(encode(dtype, shape, data)))
        elif self._uploads is not None:
            # Encoded where it is written, since its checksum takes longer than the writing.
            self._uploads.run(lambda: self._store.put(file, encode(dtype, shape, data)))

    def _noted(self, record: Record) -> Record:
        """A record that is in the step's document; one whose original is not there stands for itself."""
        size = self._sizes.get(record.alias_of) if record.alias_of is not None else None
        if size is None:
            record = record._replace(alias_of=None)
            size = file_bytes(record.dtype, record.shape)
        self._sizes[record.name] = size
        self._tensors.append((record.name, record.origin, record.alias_of))
        self._entries.append(
            f'{record.entry_text()},"file":{quoted(f"{record.name}.pt")},"file_bytes":{size}}}'
        )
        return record

    def _put(self, name: str, data: bytes) -> None:
        if self._travel is not None:
            self._travel.put(self._travelling, name, data)
        elif self._uploads is not None:
            self._uploads.put(name, [data])
