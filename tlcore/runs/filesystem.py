"""The read-only fsspec filesystem ``tlcore``: any run as the documented tree of ``.pt`` and JSON files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from fsspec import AbstractFileSystem

from tlcore_backends.pt.encode import encode, file_bytes

from ..errors import ConfigError
from ..layout.checksums import digest_of_files, has_checksum, is_sound, with_checksum
from ..layout.names import rank_suffix, step_dir
from ..layout.run_files import RUN_FILE
from ..protocols import SupportsFileTree
from ..reader import Step, open_run
from ..reader.stored import Stored
from ..reader.tensor_bytes import kind, payload
from ..reader.wanted import STORED
from ..record import Json
from ..statistics.channel_file import CHANNEL_FILE
from .conversion import summary_of

_MOST_STEPS = 32
_OF_EVERY_RECORD = frozenset(
    (
        *("name", "module", "call", "direction", "path", "dtype", "shape", "device", "bytes", "hash"),
        *("alias_of", "placements", "converted_from", "row_scale"),
    )
)


class RunFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """The files of the run at ``run`` (a path or URL) as the ``pt`` backend would have written them.

    ``storage_options`` go to the URL's own filesystem. Names are relative to the run. A run that is
    ``pt`` already is shown as it is; of any other, the steps that every rank has committed, each of which is
    looked at when something in it is asked for. Raises ConfigError where no run is named, ReadError when
    there is none or a step is damaged, FileNotFoundError for a missing name; writing is not supported.
    """

    protocol: ClassVar[str] = "tlcore"
    # A run that is still written to would otherwise look the same for ever.
    cachable: ClassVar[bool] = False

    def __init__(
        self, run: str = "", storage_options: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if not run:
            raise ConfigError("run", "tlcore:// shows the files of one run", "Give its path or URL as run=.")
        opened = open_run(run, storage_options)
        self._run = opened
        self._steps: dict[str, int] = {}
        # Of a step no more than names and sizes, which are soon made again.
        self._in_step = lru_cache(maxsize=_MOST_STEPS)(self._files_of_step)
        source = opened.stored.source
        if isinstance(source, SupportsFileTree):
            self._top = _Files(
                {name: _File(size, partial(source.file, name)) for name, size in source.tree().items()}
            )
            return
        files = opened.stored.files
        names = (name for name in files.top if name.endswith(".json") or CHANNEL_FILE.fullmatch(name))
        found = {name: _File(None, partial(files.read, name)) for name in names}
        document = {**opened.document, "backend": "pt", "layout": 1}
        # As the run's own documents do.
        text = files.read(RUN_FILE) if RUN_FILE in found else b""
        self._has_checksums = is_sound(text) is not None if text else False

        def own() -> bytes:
            # A damaged one must not get a checksum that fits.
            return _readable(document, has_checksum(text, f"{opened.url}/{RUN_FILE}"))

        self._top = _Files({**found, RUN_FILE: _File(None, own)})
        self._steps = {step_dir(number): number for number in opened.steps}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What lies directly in a directory, or the file itself."""
        path = self._strip_protocol(path).strip("/")
        files = self._around(path)
        if path in files.by_name:
            found = [path]
        else:
            found = list(files.in_directory.get(path, ()))
            if not path:
                found += self._steps
            elif not found:
                raise FileNotFoundError(f"{self._run.url}: {path}")
        return [self.info(name) for name in found] if detail else found

    def info(self, path: str, **_: Any) -> Json:
        """Name, size in bytes, and type of a file or directory."""
        path = self._strip_protocol(path).strip("/")
        if not path or path in self._steps:
            return {"name": path, "size": 0, "type": "directory"}
        files = self._around(path)
        if path in files.by_name:
            size, content = files.by_name[path]
            return {"name": path, "size": len(content()) if size is None else size, "type": "file"}
        if path in files.in_directory:
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(f"{self._run.url}: {path}")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """The bytes ``[start, end)`` of a file, all of it by default."""
        path = self._strip_protocol(path).strip("/")
        file = self._around(path).by_name.get(path)
        if file is None:
            raise FileNotFoundError(f"{self._run.url}: {path}")
        return file.content()[start:end]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError for whatever would change the run."""
        raise NotImplementedError(f"{self._run.url}: a run can only be read here")

    # fsspec's own do nothing, or say nothing.
    mkdir = makedirs = rmdir = rm = rm_file = cp_file = mv = _refuse

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode != "rb":
            self._refuse()
        return io.BytesIO(self.cat_file(path))

    def _around(self, path: str) -> _Files:
        """The files of the step that a path leads into, or all others."""
        number = self._steps.get(path.partition("/")[0])
        return self._top if number is None else self._in_step(number)

    def _files_of_step(self, number: int) -> _Files:
        step = self._run[number]
        found: dict[str, _File] = {}
        for rank in step.ranks:
            found |= _of_rank(step, rank, self._run.stored, self._has_checksums)
        return _Files(found)


class _File(NamedTuple):
    """A file's size, None where only its content tells, and how to get that."""

    size: int | None
    content: Callable[[], bytes]


class _Files:
    """Files by name, and what lies directly in each of their directories."""

    def __init__(self, by_name: Mapping[str, _File]) -> None:
        self.by_name = by_name
        self.in_directory: dict[str, dict[str, None]] = {}
        for name in by_name:
            child = name
            while child:
                directory = child.rpartition("/")[0]
                known = self.in_directory.setdefault(directory, {})
                if child in known:
                    break
                known[child] = None
                child = directory


def _of_rank(step: Step, rank: int, stored: Stored, checksums: bool) -> dict[str, _File]:
    directory, suffix = step_dir(step.number), rank_suffix(rank)
    document = step.documents[rank]
    found: dict[str, _File] = {}
    for record in document["records"]:
        name = record["name"]
        found[f"{name}.pt"] = _File(_size(record), partial(_encoded, step, name))
    for name in sorted(stored.structure_names(step.number, rank)):
        ranked = f"{name.removesuffix('.json')}{suffix}.json"
        found[f"{directory}/{ranked}"] = _File(None, partial(_structure, stored, step.number, rank, name))
    calls = "".join(f"{call}\n" for call in document["calls"]).encode()
    found[f"{directory}/module_calls{suffix}.txt"] = _File(len(calls), lambda: calls)
    found[f"{directory}/step{suffix}.json"] = _File(None, lambda: _step_json(step, rank, checksums))
    return found


def _structure(stored: Stored, step: int, rank: int, name: str) -> bytes:
    return _readable(stored.structure(step, rank, name))


def _step_json(step: Step, rank: int, checksums: bool) -> bytes:
    """The ``step.json`` of the tree, in which every tensor has a file of its own."""
    records = list(_in_files(step.documents[rank]["records"]))
    summary = summary_of(step, rank)
    document = summary.to_json(records)
    if checksums:
        suffix, structures = rank_suffix(rank), summary.structures
        files = {
            f"{name.removesuffix('.json')}{suffix}.json": _readable(structures[name]) for name in structures
        }
        document["structures_hash"] = digest_of_files(files)
    text = json.dumps(document, separators=(",", ":")) + "\n"
    return with_checksum(text) if checksums else text.encode()


def _in_files(records: list[Json]) -> Iterator[Json]:
    for record in records:
        # What else a record has is where the bytes lie in its own format.
        entry = {key: value for key, value in record.items() if key in _OF_EVERY_RECORD}
        yield {**entry, "file": f"{record['name']}.pt", "file_bytes": _size(record)}


def _size(record: Json) -> int:
    """How many bytes a record's ``.pt`` file has. Raises ReadError for a record that makes no sense."""
    return _file_bytes(*kind(record, str(record.get("name"))))


@lru_cache(maxsize=4096)
def _file_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return file_bytes(dtype, shape)


def _encoded(step: Step, name: str) -> bytes:
    tensor = step.part(name, dtype=STORED)
    return _file(tensor.dtype, tuple(tensor.shape), payload(tensor))


def _file(dtype: torch.dtype, shape: tuple[int, ...], data: memoryview) -> bytes:
    return b"".join(encode(dtype, shape, data))


def _readable(document: Any, checksum: bool = False) -> bytes:
    text = json.dumps(document, indent=1) + "\n"
    return with_checksum(text) if checksum else text.encode()
