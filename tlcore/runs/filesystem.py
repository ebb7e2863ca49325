"""The read-only fsspec filesystem ``tlcore``: any run as the documented tree of ``.pt`` and JSON files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from fsspec import AbstractFileSystem

from tlcore_backends.pt.encode import encode, file_bytes

from ..layout.names import rank_suffix, step_dir
from ..layout.run_files import RUN_FILE
from ..protocols import SupportsFileTree
from ..reader import Step, open_run
from ..reader.tensor_bytes import kind, payload
from ..record import Json
from ..statistics.channel_file import CHANNEL_FILE
from .convert import summary_of

_Render = Callable[[], bytes]
_OF_EVERY_RECORD = frozenset(
    (
        *("name", "module", "call", "direction", "path", "dtype", "shape", "device", "bytes", "hash"),
        *("alias_of", "placements", "converted_from"),
    )
)


class RunFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """The files of the run at ``run`` (a path or URL) as the ``pt`` backend would have written them.

    ``storage_options`` go to the URL's own filesystem. Names are relative to the run. A run that is
    ``pt`` already is shown as it is; of any other, the steps that every rank has committed. Raises
    ReadError when there is no run, FileNotFoundError for a missing name; writing is not supported.
    """

    protocol: ClassVar[str] = "tlcore"
    # A run that is still written to would otherwise look the same for ever.
    cachable: ClassVar[bool] = False

    def __init__(self, run: str, storage_options: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        opened = open_run(run, storage_options)
        self._run = opened
        self._sizes: dict[str, int | _Render] = {}
        self._renders: dict[str, _Render] = {}
        self._read: Callable[[str], bytes] = opened.stored.files.read
        source = opened.stored.source
        if isinstance(source, SupportsFileTree):
            self._sizes |= source.tree()
            self._read = source.file
            return
        for name in opened.stored.files.top:
            if name.endswith(".json") or CHANNEL_FILE.fullmatch(name):
                self._add(name, partial(opened.stored.files.read, name))
        self._add(RUN_FILE, lambda: _readable({**opened.document, "backend": "pt", "layout": 1}))
        for step in opened.values():
            for rank in step.ranks:
                self._add_step(step, rank)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What lies directly in a directory, or the file itself."""
        path = self._strip_protocol(path).strip("/")
        if path in self._sizes:
            found = [path]
        else:
            begin = f"{path}/" if path else ""
            children = (name[len(begin) :] for name in self._sizes if name.startswith(begin))
            found = [begin + child for child in dict.fromkeys(rest.partition("/")[0] for rest in children)]
            if path and not found:
                raise FileNotFoundError(f"{self._run.url}: {path}")
        return [self.info(name) for name in found] if detail else found

    def info(self, path: str, **_: Any) -> Json:
        """Name, size in bytes, and type of a file or directory."""
        path = self._strip_protocol(path).strip("/")
        if path in self._sizes:
            size = self._sizes[path]
            return {"name": path, "size": size if isinstance(size, int) else len(size()), "type": "file"}
        if not path or any(name.startswith(f"{path}/") for name in self._sizes):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(f"{self._run.url}: {path}")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """The bytes ``[start, end)`` of a file, all of it by default."""
        path = self._strip_protocol(path).strip("/")
        if path not in self._sizes:
            raise FileNotFoundError(f"{self._run.url}: {path}")
        render = self._renders.get(path)
        data = self._read(path) if render is None else render()
        return data[start:end]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode != "rb":
            raise NotImplementedError("a run can only be read")
        return io.BytesIO(self.cat_file(path))

    def _add(self, name: str, render: _Render, size: int | None = None) -> None:
        self._renders[name] = render
        self._sizes[name] = render if size is None else size

    def _add_step(self, step: Step, rank: int) -> None:
        directory, suffix = step_dir(step.number), rank_suffix(rank)
        document, structures = step.documents[rank], step.structures(rank)
        for record in document["records"]:
            name = record["name"]
            self._add(f"{name}.pt", partial(_encoded, step, name), _size(record))
        for name, node in structures.items():
            ranked = f"{name.removesuffix('.json')}{suffix}.json"
            self._add(f"{directory}/{ranked}", partial(_readable, node))
        calls = "".join(f"{call}\n" for call in document["calls"]).encode()
        self._add(f"{directory}/module_calls{suffix}.txt", lambda: calls)
        self._add(f"{directory}/step{suffix}.json", lambda: _step_json(step, rank))


def _step_json(step: Step, rank: int) -> bytes:
    """The ``step.json`` of the tree, in which every tensor has a file of its own."""
    records = list(_in_files(step.documents[rank]["records"]))
    document = summary_of(step, rank).to_json(records)
    return (json.dumps(document, separators=(",", ":")) + "\n").encode()


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
    tensor = step.tensor(name)
    return _file(tensor.dtype, tuple(tensor.shape), payload(tensor))


def _file(dtype: torch.dtype, shape: tuple[int, ...], data: memoryview) -> bytes:
    return b"".join(encode(dtype, shape, data))


def _readable(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()
