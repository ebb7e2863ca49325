"""Reading the documented tree: one ``.pt`` file a tensor, JSON files beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any

from tlcore.errors import ReadError
from tlcore.hotpath.beneath import read_texts
from tlcore.hotpath.reading import Scratch
from tlcore.hotpath.rows import read_rows
from tlcore.layout.directions import PATTERN
from tlcore.layout.dtypes import item_size
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.run_files import LARGEST_JSON, BlockStream, FileStream, RunFiles, parse
from tlcore.protocols import AlikeStep, Buffer, Outline, StepRanks, WholeCheck
from tlcore.record import Json
from tlcore.storage import Store

from ..storage.step_files import StepFiles
from .alike import UNUSUAL
from .alike_steps import alike_steps
from .decode import parts
from .encode import head, payload_in
from .moved_tensors import MovedTensors
from .outlines import Outlines
from .sound_tensors import SoundTensors
from .structure_files import StructureFiles
from .whole_check import LARGEST_TEXTS, Files, check_steps
from .zip_parts import PtError

_TENSOR_FILE = ".pt"
_DIRECTION = re.compile(PATTERN)
# What a .pt file holds beside its payload is far less.
_LARGEST_FRAME = 1 << 20
_THREADS = min(4, os.cpu_count() or 1)


class PtSource:
    """Reads a run that `PtSink` wrote, and ``.pt`` files that ``torch.save`` wrote into its place.

    Nothing is unpickled.
    """

    def __init__(self, store: Store, run: Json) -> None:
        self._files = RunFiles(store)
        self._steps = StepFiles(self._files, run)
        self._outlines = Outlines(self._steps, self._files.url)
        self._structures = StructureFiles(self._files)
        directory = self._files.directory
        self._sound = None if directory is None else SoundTensors(directory)
        self._scratch = Scratch()
        # Files that hold a tensor of which capture writes another file.
        self._rewritten: set[str] = set()

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """The steps that have a directory, with the ranks whose ``step.json`` is there."""
        return self._steps

    def document(self, step: int, rank: int) -> Json:
        """A rank's ``step.json``."""
        document: Json = self._steps.document(step, rank)
        return document

    def structure_names(self, step: int, rank: int) -> Collection[str]:
        """The structure files that a rank wrote."""
        skip, ending = len(step_dir(step)) + 1, len(f"{rank_suffix(rank)}.json")
        return {f"{name[skip:-ending]}.json" for name in self._structure_files(step, rank)}

    def _structure_files(self, step: int, rank: int) -> list[str]:
        """The names of these files in the run."""
        begin, ending = f"{step_dir(step)}/", f"{rank_suffix(rank)}.json"
        known: dict[str, bool] = {}
        found = []
        for name in self._files.names_in(step_dir(step), ending):
            directory, _, last = name.rpartition("/")
            # Calls are many, and what of them is stored has few names.
            if last not in known:
                known[last] = _DIRECTION.fullmatch(last.removesuffix(ending)) is not None
            if known[last] and directory.startswith(begin):
                found.append(name)
        return found

    def structure(self, step: int, rank: int, name: str) -> Any:
        """The value of a structure file."""
        file = _structure_file(step, rank, name)
        text = self._structures.known(step, rank).get(file)
        return self._files.json(file) if text is None else parse(text, f"{self._files.url}/{file}")

    def structure_texts(self, step: int, rank: int, names: Sequence[str]) -> Sequence[bytes | None]:
        """The structure files, where they lie on this machine and are small."""
        begin, ending = f"{step_dir(step)}/", f"{rank_suffix(rank)}.json"
        files = [f"{begin}{name.removesuffix('.json')}{ending}" for name in names]
        known, directory = self._structures.known(step, rank), self._files.directory
        if known or directory is None:
            return [known.get(file) for file in files]
        return read_texts(directory, files, LARGEST_TEXTS)

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes of a tensor, from its file."""
        if begin == 0 and end is None:
            own = self._own(record)
            return self._foreign(record) if own is None else own
        stream = self.stream(record)
        try:
            found = bytearray((record["bytes"] if end is None else end) - begin)
            return bytes(found[: stream.readinto(begin, memoryview(found))])
        finally:
            stream.close()

    def read_many(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Buffer | Exception]:
        """The bytes of several tensors, each from its file."""
        found: list[Buffer | Exception] = []
        files = {str(record.get("file")): record["file_bytes"] for record in records if self._agrees(record)}
        whole = dict(zip(files, self._files.read_many(list(files), list(files.values())), strict=True))
        for record in records:
            data = whole.get(str(record.get("file")))
            payload = None if data is None else payload_in(record["dtype"], record["shape"], data)
            try:
                found.append(self.read(record) if payload is None else payload)
            except ReadError as error:
                found.append(error)
        return found

    def sound_read(
        self, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> Callable[[], Sequence[Buffer] | None] | None:
        """What reads tensors of a run on this machine, and proves them sound."""
        return None if self._sound is None else self._sound.prepared(records, known)

    def sound_move(
        self, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> MovedTensors | None:
        """What writes tensors of a run on this machine into a file, and proves them sound."""
        directory = self._files.directory
        if directory is not None:
            with suppress(OSError, *UNUSUAL):
                return MovedTensors(directory, self._scratch, records, known)
        return None

    def identity(self, record: Mapping[str, Any]) -> Hashable | None:
        """Equal for names of one file that mean the same by it."""
        blob = self._files.identity(self._file(record))
        return None if blob is None else (blob, record["dtype"], tuple(record["shape"]))

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the file is there in its size."""
        size = record.get("file_bytes")
        return size is not None and self._files.size(self._file(record)) == size

    def misfit(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with the file's size; or, once it was read, with what is around its tensor."""
        file = self._file(record)
        rewritten = f"{file}: around its tensor, it is not as it was written"
        return self._misfit(record) or (rewritten if file in self._rewritten else None)

    def _misfit(self, record: Mapping[str, Any]) -> str | None:
        file, stated = self._file(record), record.get("file_bytes")
        size = self._files.size(file)
        fits = size is None or size == stated
        return None if fits else f"{file}: {size} bytes, step.json says {stated}"

    def advise(self, record: Mapping[str, Any]) -> None:
        """Have the system fetch the file."""
        self._files.advise(self._file(record))

    def stream(self, record: Mapping[str, Any]) -> FileStream | BlockStream:
        """The bytes of a tensor, from its file; one that is not as `encode` writes it is read whole."""
        file = self._file(record)
        if record.get("file_bytes") is not None and (problem := self._misfit(record)) is not None:
            raise ReadError(f"{self._files.url}/{problem}")
        first = head(_dtype(record), tuple(record["shape"]))
        found = bytearray(len(first))
        stream = self._files.stream(file, 0)
        if stream.readinto(0, memoryview(found)) == len(first) and found == first:
            stream.skip(len(first))
            return stream
        stream.close()
        data = memoryview(self._foreign(record))
        return BlockStream(lambda start, end: data[start:end], len(data))

    def remains(self, step: int) -> Mapping[str, Json]:
        """The finished tensor files of a step."""
        return _Remains(self._files, step_dir(step))

    def problems(self, step: int, rank: int, document: Json, thorough: bool = True) -> Iterator[str]:
        """Whether the structures and ``module_calls.txt`` agree with ``step.json``."""
        yield from self._structures.problems(step, rank, self._structure_files(step, rank), document)
        if not thorough:
            return
        name = f"{step_dir(step)}/module_calls{rank_suffix(rank)}.txt"
        try:
            calls = self._files.read(name, 0, LARGEST_JSON)
        except ReadError as error:
            yield str(error)
        else:
            if calls != "".join(f"{call}\n" for call in document["calls"]).encode():
                yield f"{name}: differs from step.json"

    @property
    def unchecked(self) -> Collection[str]:
        """The ``step.json`` read so far that have no checksum."""
        return self._steps.unchecked

    def whole_checks(self, rank: int) -> Iterator[WholeCheck]:
        """Checks of a rank's steps, in order, of a run on this machine: each step's files in few calls."""
        directory = self._files.directory
        if directory is not None:
            with ThreadPoolExecutor(_THREADS, "tlcore-verify") as pool:
                try:
                    names = partial(self.structure_names, rank=rank)
                    parsed = partial(self._steps.hand_over, rank)
                    files = Files(directory, rank, names, parsed)
                    yield from check_steps(files, self._texts(rank), pool, _THREADS)
                finally:
                    pool.shutdown(cancel_futures=True)

    def alike_steps(self, rank: int) -> Iterator[AlikeStep | int]:
        """A rank's steps in order, of a run on this machine; such as are like an earlier one as a whole."""
        directory = self._files.directory
        if directory is not None:
            names = partial(self.structure_names, rank=rank)
            yield from alike_steps(directory, rank, self._texts(rank), names)

    def _texts(self, rank: int) -> Iterator[tuple[int, bytes]]:
        """Each ``step.json`` of a rank that can be read and is as it was written."""
        for step, ranks in self._steps.items():
            if rank in ranks.committed:
                with suppress(ReadError):
                    text = self._steps.text(step, rank)
                    self._steps.note(text, step, rank)
                    yield step, text

    def outline(self, step: int, rank: int) -> Outline:
        """What a rank has committed of a step, but for its records. Raises MissingError or ReadError."""
        return self._outlines.of(step, rank)

    def record_in(self, record: Mapping[str, Any], step: int) -> Json:
        """The record of the same tensor in a step that is alike; its hash is the other's."""
        name = _name_in(record, step)
        return {**record, "name": name, "file": f"{name}{_TENSOR_FILE}"}

    def read_rows(self, record: Mapping[str, Any], steps: Sequence[int], pieces: Any, target: Any) -> bytes:
        """Put rows of the same tensor in these steps, which are alike, to their places, file by file."""
        directory = self._files.directory
        if directory is not None and self._agrees(record):
            names = [f"{_name_in(record, step)}{_TENSOR_FILE}" for step in steps]
            first = head(record["dtype"], record["shape"])
            # Rows that the tensor has not are told of by who reads them one by one.
            with suppress(ValueError):
                return read_rows(directory, names, record["file_bytes"], first, pieces, target)
        return bytes(len(steps))

    def tree(self) -> Mapping[str, int]:
        """Every file of the run: the documented tree is how it lies there."""
        return self._files.sizes

    def file(self, name: str) -> bytes:
        """The bytes of a file."""
        return self._files.read(name)

    def close(self) -> None:
        """Nothing is held open."""

    def _file(self, record: Mapping[str, Any]) -> str:
        file = record.get("file")
        if not isinstance(file, str):
            where = f"{self._files.url}: {record.get('name')!r}"
            raise ReadError(f"{where}: damaged record, or of a backend that this version cannot read")
        return file

    def _own(self, record: Mapping[str, Any]) -> Buffer | None:
        """The payload of a file that holds exactly what it should; else None."""
        if not self._agrees(record):
            return None
        data = self._files.read(self._file(record), 0, record["file_bytes"] + 1)
        return payload_in(record["dtype"], record["shape"], data)

    def _agrees(self, record: Mapping[str, Any]) -> bool:
        """Whether the sizes in a record are those of its dtype and shape."""
        size, width = record.get("file_bytes"), item_size(record["dtype"])
        if size is None or size > record["bytes"] + _LARGEST_FRAME:
            return False
        agrees: bool = width is not None and prod(record["shape"]) * width == record["bytes"]
        return agrees

    def _foreign(self, record: Mapping[str, Any]) -> Buffer:
        """The payload of any other file; what is wrong with it is said."""
        file = self._file(record)
        where = f"{self._files.url}/{file}"
        if (self._files.size(file) or 0) > record["bytes"] + _LARGEST_FRAME:
            raise ReadError(f"{where}: far larger than the {record['bytes']} bytes that step.json says")
        dtype, shape, data = _decoded(self._files, file)
        found, stated = (dtype, list(shape)), (record["dtype"], list(record["shape"]))
        if found != stated:
            raise ReadError(f"{where}: holds {found}, its step.json says {stated}")
        self._rewritten.add(file)
        return data


class _Remains(Mapping[str, Json]):
    """The records of finished tensor files; each file is looked into when its record is asked for."""

    def __init__(self, files: RunFiles, directory: str) -> None:
        self._files = files
        self._names = {
            name.removesuffix(_TENSOR_FILE): name
            for name in sorted(files.sizes_in(directory))
            if name.startswith(f"{directory}/") and name.endswith(_TENSOR_FILE)
        }

    def __getitem__(self, name: str) -> Json:
        file = self._names[name]
        dtype, shape, data = _decoded(self._files, file)
        return {"name": name, "file": file, "dtype": dtype, "shape": list(shape), "bytes": data.nbytes}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _decoded(files: RunFiles, file: str) -> tuple[str, tuple[int, ...], memoryview]:
    where = f"{files.url}/{file}"
    try:
        dtype, shape, data = parts(files.read(file))
    except PtError as error:
        raise ReadError(f"{where}: not a readable .pt file ({error})") from None
    except MemoryError:
        raise ReadError(f"{where}: larger than this machine's memory") from None
    return dtype, shape, data


def _name_in(record: Mapping[str, Any], step: int) -> str:
    """The name of a record's tensor in another step."""
    return f"{step_dir(step)}/{str(record['name']).partition('/')[2]}"


def _structure_file(step: int, rank: int, name: str) -> str:
    return f"{step_dir(step)}/{name.removesuffix('.json')}{rank_suffix(rank)}.json"


def _dtype(record: Mapping[str, Any]) -> str:
    """The name of the record's dtype. Raises ReadError for a record whose size is not that of its shape."""
    dtype, shape = str(record["dtype"]), record["shape"]
    width = item_size(dtype)
    if width is None:
        raise ReadError(f"{record['name']!r}: damaged record, there is no dtype {record['dtype']!r}")
    if prod(shape) * width != record["bytes"]:
        raise ReadError(f"{record['name']!r}: {record['bytes']} bytes are no {dtype} of shape {shape}")
    return dtype
