"""What msprobe (MindStudio Probe) dumps: a ``dump.json`` for each step and rank, and a file a tensor."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from tlcore.errors import MissingError, ReadError
from tlcore.layout.checks import is_shape
from tlcore.layout.dtypes import item_size
from tlcore.layout.names import PathKey
from tlcore.layout.run_files import LARGEST_JSON, parse
from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json

from .arrays import describe_npy, read_npy
from .documents import Found
from .files import DumpFiles, shown_path
from .msprobe_names import told_by_names
from .pickled import TensorAt, plain
from .source import ForeignSource, as_told
from .torch_files import torch_file

log = logging.getLogger("tlcore")
_DUMP, _TREE = "dump.json", "construct.json"
_BESIDE = (_TREE, "stack.json", "dump_tensor_data")
_STEP = re.compile(r"step(\d{1,9})")
_PROCESS = re.compile(r"(rank|proc)(\d{1,9})?")
_MODULE = re.compile(
    r"(?:Module|Cell)\.(.*)\.[^.]+\.(forward|backward|parameters_grad)\.(\d{1,9})", re.DOTALL
)
_FUNCTION = re.compile(r"(.+)\.(\d{1,9})\.(forward|backward)", re.DOTALL)
_NO_NUMBER = re.compile(rb"(?<=[\s:,\[])(?:NaN|-?Infinity)(?=[\s,\]}])")
_DEEPEST = 50
Path = tuple[PathKey, ...]


class _Entry(NamedTuple):
    """An entry of ``dump.json``: a call of a module or function, or what its backward had."""

    module: str
    kind: str
    call: int
    held: Json


class Msprobe(ForeignSource):
    """Modules as they are called; functions, where dumped, are modules such as ``Functional.linear``.

    Gradients lie beside the values. A module's parameters are modules called ``param.<module>.<name>``.
    """

    tool = "msprobe"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """The dump's directory, or that of one step, or of one rank in it."""
        places = _places(files)
        if isinstance(places, str):
            return places
        if not places:
            return _lacking(files)
        first = next(iter(places.values()))
        document = _document(files, f"{first}{_DUMP}")
        if not isinstance(document, dict) or not {"task", "level", "data"} <= document.keys():
            # Another tool's file may be called so.
            return f"{first}{_DUMP}: has no task, level and data, as msprobe's has"
        return {"world_size": max(rank for _, rank in places) + 1}

    @cached_property
    def _places(self) -> Mapping[tuple[int, int], str]:
        places = _places(self.files)
        if isinstance(places, str):
            raise ReadError(f"{self.files.url}: {places}")
        return places

    @cached_property
    def steps(self) -> Mapping[int, StepRanks]:
        """The steps, with the ranks that have them."""
        ranks: dict[int, set[int]] = {}
        for step, rank in self._places:
            ranks.setdefault(step, set()).add(rank)
        return {step: StepRanks(frozenset(each)) for step, each in sorted(ranks.items())}

    def found(self, step: int, rank: int) -> list[Found]:
        """The tensors: a call's arguments where it begins, its results where it ends."""
        place = self._places[step, rank]
        where = f"{self.files.url}/{place}{_DUMP}"
        document = _document(self.files, f"{place}{_DUMP}")
        data = document.get("data") if isinstance(document, dict) else None
        if not isinstance(data, dict) or not all(isinstance(each, dict) for each in data.values()):
            raise ReadError(f"{where}: damaged, its data are no entries")
        folder = f"{place}dump_tensor_data"
        described = _Nodes(self.files, folder, where)
        found = [
            each
            for key, begins in _in_order(data, self._parents(place))
            for each in described.of(_entry(key, data[key]), begins)
        ]
        return found + self._unlisted(folder, found)

    def _unlisted(self, folder: str, found: list[Found]) -> list[Found]:
        """The tensors of files that ``dump.json`` does not name."""
        listed = {each.place["tensor"] for each in found if each.place is not None}
        more = [name for name in self.files.files_in(folder) if name not in listed]
        if not more:
            return []
        names = [name[len(folder) + 1 :] for name in more]
        named = told_by_names(folder, names, lambda key: _entry(key, {})[:3], self._seen)
        known = {(each.module, each.direction, each.path, each.call) for each in found}
        named = [each for each in named if (each.module, each.direction, each.path, each.call) not in known]
        if named:
            log.warning(
                "%s/%s: %d tensors are told by their files' names, in an order that is guessed: %s does not "
                "list them, as of a run that ended before it was written",
                self.files.url,
                folder,
                len(named),
                _DUMP,
            )
        return named

    def _parents(self, place: str) -> Mapping[str, Any]:
        try:
            found = self.files.json(f"{place}{_TREE}")
        except MissingError:
            return {}
        return found if isinstance(found, dict) else {}

    def located(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the place of its bytes; its file is looked at only now."""
        name = str(record["place"]["tensor"])
        return as_told(record, self._seen(name), f"{shown_path(self.files, name)}", f"{_DUMP} says")

    def _seen(self, name: str) -> Found:
        """What a tensor's file holds, and where."""
        if name.endswith(".npy"):
            return describe_npy(self.files, name, "")
        file = torch_file(self.files, name, self.files.files_in(name.rpartition("/")[0])[name])
        value = plain(file.value)
        if not isinstance(value, TensorAt):
            raise ReadError(f"{shown_path(self.files, name)}: holds no plain tensor")
        at = file.at(value)
        return Found("", "", (), at.dtype, at.shape, at.place())

    def whole(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor whose record is `located`."""
        return read_npy(self.files, record)


class _Nodes:
    """The tensors that the entries of one ``dump.json`` describe."""

    def __init__(self, files: DumpFiles, folder: str, where: str) -> None:
        self._there = files.files_in(folder)
        self._folder, self._where = folder, where

    def of(self, entry: _Entry, begins: bool) -> Iterator[Found]:
        """What a call ``begins`` with, else what it ends with."""
        held = entry.held
        if entry.kind == "parameters_grad":
            if not begins:
                yield from self._parameters(entry, held, "grad_outputs")
            return
        if entry.kind == "backward":
            if begins:
                yield from self._results(entry, held.get("input"), "grad_outputs")
            else:
                yield from self._in(entry, held.get("output"), "grad_inputs", ())
            return
        if begins:
            yield from self._in(entry, held.get("input_args", held.get("input")), "inputs", ())
            yield from self._in(entry, held.get("input_kwargs"), "inputs", ())
            yield from self._parameters(entry, held.get("parameters"), "outputs")
        else:
            yield from self._results(entry, held.get("output"), "outputs")

    def _parameters(self, entry: _Entry, held: Any, direction: str) -> Iterator[Found]:
        for name, node in held.items() if isinstance(held, dict) else ():
            owner = entry._replace(module=f"param.{entry.module}.{name}")
            yield from self._results(owner, node, direction)

    def _results(self, entry: _Entry, node: Any, direction: str) -> Iterator[Found]:
        """A result that is alone stands in a list, too."""
        alone = isinstance(node, list) and len(node) == 1
        yield from self._in(entry, node[0] if alone else node, direction, ())

    def _in(self, entry: _Entry, node: Any, direction: str, path: Path) -> Iterator[Found]:
        if len(path) > _DEEPEST:
            raise ReadError(f"{self._where}: nested too deep")
        if isinstance(node, list):
            for place, each in enumerate(node):
                yield from self._in(entry, each, direction, (*path, place))
        elif isinstance(node, dict) and isinstance(node.get("shape"), list) and "dtype" in node:
            yield self._tensor(node, Found(entry.module, direction, path, call=entry.call))
        elif isinstance(node, dict):
            for key, each in node.items():
                yield from self._in(entry, each, direction, (*path, key))

    def _tensor(self, node: Json, found: Found) -> Found:
        dtype, shape = str(node["dtype"]).removeprefix("torch.").lower(), node["shape"]
        if not is_shape(shape):
            raise ReadError(f"{self._where}: a shape of {found.module!r} makes no sense")
        if item_size(dtype) is None:
            return found._replace(skipped=f"there is no dtype {node['dtype']} here")
        each = found._replace(dtype=dtype, shape=tuple(shape))
        name = node.get("data_name")
        if not isinstance(name, str):
            return each._replace(skipped="only its statistics were dumped: task was not tensor")
        file = f"{self._folder}/{name}"
        if file not in self._there:
            return each._replace(skipped="its file is missing")
        return each._replace(place={"tensor": file})


def _places(files: DumpFiles) -> dict[tuple[int, int], str] | str:
    """What stands before the name of each step and rank's ``dump.json``, or what is wrong."""
    if _DUMP in files.top:
        return {(0, 0): ""}
    listed = [(int(named[1]), f"{name}/") for name in files.directories if (named := _STEP.fullmatch(name))]
    found: dict[tuple[int, int], str] = {}
    for step, directory in sorted(listed) or [(0, "")]:
        below = files.directories_in(directory.rstrip("/")) if directory else files.directories
        processes = [
            (process, name) for name in below if (process := _PROCESS.fullmatch(name.rpartition("/")[2]))
        ]
        for process, name in processes:
            if f"{name}/{_DUMP}" not in files.files_in(name):
                continue
            # A process without a rank is the only one.
            rank = int(process[2] or 0) if process[1] == "rank" else 0
            if (step, rank) in found:
                return f"holds several dumps of step {step} ({found[step, rank]}, {name}/): open one of them"
            found[step, rank] = f"{name}/"
    return found


def _lacking(files: DumpFiles) -> str | None:
    """What is missing where the rest of a dump is there, or where a dump of a step and rank would be."""
    beside = [each for each in _BESIDE if each in files.top or each in files.directories]
    if len(beside) > 1:
        return f"has {', '.join(beside)} of msprobe, but no {_DUMP}"
    steps = [name for name in files.directories if _STEP.fullmatch(name)]
    for directory in steps[:1] or [""]:
        below = files.directories_in(directory) if directory else files.directories
        process = next((name for name in below if _PROCESS.fullmatch(name.rpartition("/")[2])), None)
        if process is not None and (_TREE in _own(files, process) or _BESIDE[1] in _own(files, process)):
            return f"has {process} of msprobe, but no {_DUMP} in it"
    return None


def _own(files: DumpFiles, directory: str) -> set[str]:
    return {name.rpartition("/")[2] for name in files.files_in(directory)}


def _document(files: DumpFiles, name: str) -> Any:
    """A JSON file in which statistics may be no numbers."""
    data = files.read(name, 0, LARGEST_JSON + 1)
    return parse(_NO_NUMBER.sub(b"null", data), f"{shown_path(files, name)}")


def _entry(key: str, held: Json) -> _Entry:
    if (found := _MODULE.fullmatch(key)) is not None:
        return _Entry(found[1], found[2], int(found[3]), held)
    if (found := _FUNCTION.fullmatch(key)) is not None:
        return _Entry(found[1], found[3], int(found[2]), held)
    return _Entry(key, "forward", 0, held)


def _in_order(data: Mapping[str, Json], parents: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Each entry twice: where it begins, which is before what is within it, and where it ends."""
    begun: set[str] = set()
    for key in data:
        around: list[str] = []
        each: Any = key
        while isinstance(each, str) and each not in begun:
            begun.add(each)
            around.append(each)
            each = parents.get(each)
        yield from ((outer, True) for outer in reversed(around) if outer in data)
        yield key, False
