"""Steps that are like an earlier one, each written as one directory in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from tlcore.alike import AlikeStep
from tlcore.hotpath.making import NO_LINK, Row
from tlcore.hotpath.reading import Scratch
from tlcore.hotpath.seals import seal
from tlcore.layout.checksums import digest, with_checksum
from tlcore.layout.hashes import HASH_BYTES
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.templates import STEP_DIR, Structures, quoted
from tlcore.record import Origin, Record, StepSummary
from tlcore.storage import Buffer, Folder, OpenFolder, SupportsFolders

from .encode import Frame, file_bytes, frame_of

_HASH = "0" * 31 + "?"
_ROW_NUMBERS = 7
_DIRECTORY = STEP_DIR.encode()
_NOTHING = memoryview(b"")
# Where a structure names a file, or another structure, of its own step.
_NAMING = ('"file": "', '"name": "')


class Written(NamedTuple):
    """What is remembered of a step that was written: its tensors, and the rest of it."""

    tensors: Sequence[tuple[str, Origin, str | None]]
    structures: Structures
    calls: Sequence[str]


class Frames:
    """What stands around payloads in their files, together: where each part lies, and its checksums."""

    def __init__(self, tensors: Sequence[tuple[Frame, int, int]]) -> None:
        """``tensors`` are each one's frame, and where its payload begins and ends in the data."""
        templates: dict[int, int] = {}
        known, seals = bytearray(), list[bytes]()
        self.rows: list[Row] = []
        self.nbytes = 0
        for frame, begin, end in tensors:
            if id(frame) not in templates:
                templates[id(frame)] = len(known)
                known += frame.text
            at, last = self.nbytes, self.nbytes + len(frame.text)
            middle = at + len(frame.head)
            seals.append(frame.seal.row(len(frame.text), templates[id(frame)], at, begin, end))
            self.rows.append((at, middle, begin, end, middle, last, NO_LINK))
            self.nbytes = last
        self._templates, self._seals = bytes(known), b"".join(seals)

    def sealed(self, data: Buffer) -> bytearray:
        """All frames, one after the other, of these data."""
        frames = bytearray(self.nbytes)
        seal(frames, self._templates, self._seals, data)
        return frames


class Pattern:
    """All that steps that are alike have in common, as it is written."""

    def __init__(self, step: int, rank: int, written: Written) -> None:
        """Raises ValueError where the step's directory stands where it cannot be told from other texts."""
        suffix = rank_suffix(rank)
        self._suffix, self._scratch = suffix, Scratch()
        own = f"{step_dir(step)}/"
        tails = [name.removeprefix(own) for name, _, _ in written.tensors]
        positions: dict[str, int] = {}
        self._originals: list[int] = []
        for position, (name, _, alias) in enumerate(written.tensors):
            self._originals.append(position if alias is None else self._originals[positions[alias]])
            positions[name] = position
        self._entries = self._entry_texts(written, tails, own)
        self._place_tensors(written)
        ranked = {f"{name.removesuffix('.json')}{suffix}.json": name for name in written.structures}
        # In the order in which their hash takes them.
        texts = sorted(ranked)
        self._place_texts(written, [ranked[name] for name in texts], own)
        files = [f"{tail}.pt" for tail in tails]
        self._names = [*files, *texts, f"module_calls{suffix}.txt", f"step{suffix}.json"]
        self._folders = sorted({name.rpartition("/")[0] for name in (*files, *texts)} - {""})
        if any("/" in folder for folder in self._folders):
            raise ValueError("a call has no directory of its own")

    def _entry_texts(self, written: Written, tails: Sequence[str], own: str) -> list[str]:
        """The records in ``step.json``, cut where their hashes stand."""
        entries = []
        for tail, (_, origin, alias) in zip(tails, written.tensors, strict=True):
            shared = None if alias is None else f"{STEP_DIR}/{alias.removeprefix(own)}"
            record = Record(f"{STEP_DIR}/{tail}", 0, origin, _NOTHING, _HASH, shared)
            file, size = f"{record.name}.pt", file_bytes(origin.dtype, origin.shape)
            entries.append(f'{record.entry_text()},"file":{quoted(file)},"file_bytes":{size}}}')
        pieces = ",".join(entries).split(_HASH)
        if len(pieces) != len(entries) + 1:
            raise ValueError("a record has what stands for a hash")
        return pieces

    def _place_tensors(self, written: Written) -> None:
        """Where the parts of each file lie: its frame among the texts, its payload in the data."""
        own, self.nbytes = list[tuple[Frame, int, int]](), 0
        for position, (_, origin, _) in enumerate(written.tensors):
            if self._originals[position] == position:
                frame = frame_of(str(origin.dtype).removeprefix("torch."), origin.shape)
                own.append((frame, self.nbytes, self.nbytes + frame.payload_bytes))
                self.nbytes += frame.payload_bytes
        self._frames = Frames(own)
        rows = iter(self._frames.rows)
        self._rows = [
            next(rows) if original == position else (0, 0, 0, 0, 0, 0, original)
            for position, original in enumerate(self._originals)
        ]

    def _place_texts(self, written: Written, names: Sequence[str], own: str) -> None:
        """The structures and the call order, one after the other, open where the step's directory stands."""
        texts = []
        for name in names:
            text = written.structures.readable(name)
            opened = text
            for key in _NAMING:
                opened = opened.replace(f"{key}{own}", f"{key}{STEP_DIR}/")
            if own in opened:
                raise ValueError("a structure has the directory somewhere else")
            texts.append(opened.encode())
        texts.append("".join(f"{call}\n" for call in written.calls).encode())
        self._texts = b"".join(texts).split(_DIRECTORY)
        self._text_counts = np.array([text.count(_DIRECTORY) for text in texts], np.int64)
        sizes = np.array([len(text) for text in texts], np.int64)
        self._text_sizes = sizes - self._text_counts * len(_DIRECTORY)

    def begin(
        self, store: SupportsFolders, step: AlikeStep, summary: StepSummary
    ) -> Callable[[], None] | None:
        """What writes a step, in any thread; None where ``step`` is not as its reader said, or is there.

        What is returned is to be called.
        """
        count = len(self._originals)
        if step.nbytes != self.nbytes or len(step.hashes) != HASH_BYTES * count:
            return None
        # Used again once nobody holds a view of it.
        data = memoryview(self._scratch.take(self.nbytes))[: self.nbytes]
        if not step.fill(data):
            return None
        unfinished = store.begin_folder(step_dir(summary.step))
        if unfinished is None:
            return None
        try:
            return partial(_finish, unfinished, self._folder(data, step.hashes, summary))
        except BaseException:
            unfinished.abandon()
            raise

    def _folder(self, data: memoryview, hashes: bytes, summary: StepSummary) -> Folder:
        directory = step_dir(summary.step).encode()
        frames = self._frames.sealed(data)
        sizes = self._text_sizes + self._text_counts * len(directory)
        texts = directory.join(self._texts)
        # All but the last, which is the call order.
        structures = memoryview(texts)[: int(sizes[:-1].sum())]
        document = self._document(hashes, summary, digest(structures))
        ends = self._frames.nbytes + np.cumsum(np.append(sizes, len(document)))
        rows = np.zeros((len(self._names), _ROW_NUMBERS), np.int64)
        rows[: len(self._rows)] = np.array(self._rows, np.int64).reshape(-1, _ROW_NUMBERS)
        rows[len(self._rows) :, 0] = np.append(self._frames.nbytes, ends[:-1])
        rows[len(self._rows) :, 1] = ends
        rows[len(self._rows) :, 6] = NO_LINK
        whole = b"".join((frames, texts, document))
        return Folder(self._folders, self._names, rows.tobytes(), whole, data)

    def _document(self, hashes: bytes, summary: StepSummary, structures_hash: str) -> bytes:
        """The step's ``step.json``."""
        digits = hashes.hex()
        width = 2 * HASH_BYTES
        each = [digits[at : at + width] for at in range(0, len(digits), width)]
        records = "".join(chain.from_iterable(zip(self._entries, [*each, ""], strict=True)))
        text = summary.to_text([records] if each else [], {"structures_hash": quoted(structures_hash)})
        return with_checksum(text.replace(STEP_DIR, step_dir(summary.step)))


def _finish(unfinished: OpenFolder, folder: Folder) -> None:
    try:
        unfinished.make(folder)
        unfinished.publish()
    except BaseException:
        unfinished.abandon()
        raise


def pattern_of(step: int, rank: int, written: Written) -> Pattern | None:
    """The pattern of steps that are like one that was written; None where it has none."""
    try:
        return Pattern(step, rank, written)
    except (KeyError, ValueError):
        return None
