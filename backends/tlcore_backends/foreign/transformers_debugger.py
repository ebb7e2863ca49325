"""What transformers' ``model_addition_debugger_context`` writes: a tree, and a file a tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size
from tlcore.layout.names import PathKey
from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json

from .documents import Found
from .files import DumpFiles, StoredAt, shown_path
from .safetensors_files import safetensors_in, safetensors_that_begin
from .source import ONE_RANK, ForeignSource, as_told

_TREE = "_debug_tree_FULL_TENSORS.json"
_SUMMARY = "_debug_tree_SUMMARY.json"
_SUFFIX = ".safetensors"
_FILE = re.compile(r"(.*?)_(inputs_args|inputs_kwargs|outputs)(?:_(.+))?", re.DOTALL)
_LAYER = re.compile(r"(.*?\.)(\d+)(\..*|)", re.DOTALL)
_SHAPE = re.compile(r"torch\.Size\(\[([\d, ]*)\]\)")
_PRINTED = "only printed, not stored: the debugger ran with use_repr=True"
# Files up to here are read by one call.
_AT_ONCE = 1 << 20
_OVERWRITTEN = "overwritten by a later call of the module in the same forward"
Path = tuple[PathKey, ...]


class TransformersDebugger(ForeignSource):
    """One forward of a model: arguments of every module, results of those without children and of the model.

    The tree leaves out the layers between the first and the last; their files are there and are read.
    """

    tool = "transformers-debugger"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """A directory with one model's tree."""
        trees = [name for name in files.top if name.endswith(_TREE)]
        if len(trees) > 1:
            return f"holds the debug trees of several models ({', '.join(sorted(trees))}): one a directory"
        if not trees:
            summaries = [name for name in files.top if name.endswith(_SUMMARY)]
            return f"has {summaries[0]}, but no *{_TREE}" if summaries else None
        return {"world_size": 1}

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """One: a second forward overwrites the first."""
        return {0: ONE_RANK}

    @cached_property
    def _tree_file(self) -> str:
        return next(name for name in self.files.top if name.endswith(_TREE))

    @cached_property
    def _model(self) -> str:
        """The model's class, which every name begins with."""
        return self._tree_file.removesuffix(_TREE)

    def found(self, step: int, rank: int) -> list[Found]:
        """The tensors of the tree, and those of the layers that it leaves out, in their place."""
        tree = self.files.json(self._tree_file)
        if not isinstance(tree, dict) or "module_path" not in tree:
            raise ReadError(
                f"{shown_path(self.files, self._tree_file)}: not a tree of the transformers debugger"
            )
        named: list[tuple[str, Found]] = []
        self._in_node(tree, 0, named)
        counts = Counter([file for file, _ in named])
        result, calls = [], dict[tuple[Any, ...], int]()
        for file, each in named:
            counts[file] -= 1
            key = each[:3]
            call = calls.get(key, 0)
            calls[key] = call + 1
            entry = each._replace(call=call) if call else each
            if not file:
                result.append(entry)
            elif counts[file]:
                # Only the last call's is left.
                result.append(entry._replace(place=None, skipped=_OVERWRITTEN))
            else:
                result.append(self._stored(file, entry))
        beside = self._beside({file for file, _ in named})
        return _merged(result, self._told_by_names(beside, result)) if beside else result

    def _in_node(self, node: Json, depth: int, named: list[tuple[str, Found]]) -> None:
        """Each tensor of a call with its file (none if only printed), arguments, what is within, results."""
        if depth > 100 or not isinstance(node, dict):
            raise ReadError(f"{shown_path(self.files, self._tree_file)}: damaged, nested too deep or no tree")
        module = str(node.get("module_path", "")).removesuffix(" (top-level)")
        module = module.removeprefix(self._model).removeprefix(".")
        inputs = node.get("inputs") or {}
        if isinstance(inputs, dict):
            self._tensors(inputs.get("args") or [], module, "inputs", (), named)
            self._tensors(inputs.get("kwargs") or {}, module, "inputs", (), named)
        for child in node.get("children") or ():
            self._in_node(child, depth + 1, named)
        self._tensors(node.get("outputs"), module, "outputs", (), named)

    def _tensors(
        self, value: Any, module: str, direction: str, path: Path, named: list[tuple[str, Found]]
    ) -> None:
        if isinstance(value, list):
            for place, each in enumerate(value):
                self._tensors(each, module, direction, (*path, place), named)
        elif isinstance(value, dict) and isinstance(value.get("shape"), str) and "dtype" in value:
            named.append(self._tensor(value, module, direction, path))
        elif isinstance(value, dict):
            for key, each in value.items():
                self._tensors(each, module, direction, (*path, key), named)

    def _tensor(self, value: Json, module: str, direction: str, path: Path) -> tuple[str, Found]:
        dtype, shape = str(value["dtype"]).removeprefix("torch."), _sizes(value["shape"])
        file = value.get("value")
        if isinstance(file, str) and file.startswith("./"):
            return file[2:], Found(module, direction, path, dtype, shape, {"tensor": file[2:]})
        return "", Found(module, direction, path, dtype, shape, skipped=_PRINTED)

    def _stored(self, file: str, found: Found) -> Found:
        """A tensor whose file is there; it is looked at when it is read, or now where the tree is silent."""
        if file not in self.files.top:
            return found._replace(place=None, skipped="its file is missing")
        if found.dtype:
            return found
        data = self._data(file)
        return found._replace(dtype=data.dtype, shape=data.shape, place=data.place())

    def _data(self, file: str) -> StoredAt:
        return self._only(file, safetensors_in(self.files, file)[0])

    def _only(self, file: str, tensors: Mapping[str, StoredAt]) -> StoredAt:
        data = tensors.get("data")
        if data is None:
            raise ReadError(f"{shown_path(self.files, file)}: has no tensor 'data'")
        if item_size(data.dtype) is None:
            raise ReadError(f"{shown_path(self.files, file)}: there is no dtype {data.dtype} here")
        return data

    def located(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the place of its bytes; the tree may be of another forward than the file."""
        file = record["place"].get("tensor")
        if file is None:
            return record
        return self._check(record, file, self._data(file))

    def _check(self, record: Mapping[str, Any], file: str, at: StoredAt) -> Mapping[str, Any]:
        found = Found("", "", (), at.dtype, at.shape, at.place())
        said = "files of several forwards are mixed: its tree says"
        return as_told(record, found, f"{shown_path(self.files, file)}", said)

    def own_bytes(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor; a small file is read at once, header and all."""
        file = record["place"].get("tensor")
        data = None if file is None else self.files.whole(file, _AT_ONCE)
        if data is None:
            return super().own_bytes(record)
        at = self._only(file, safetensors_that_begin(self.files, file, data, len(data))[0])
        if (at.dtype, list(at.shape)) != (record["dtype"], record["shape"]):
            self._check(record, file, at)
        return data[at.at : at.at + int(record["bytes"])]

    def _beside(self, listed: set[str]) -> list[str]:
        """The files of tensors that the tree does not name: layers in the middle, the model's results."""
        found = (file for file in self.files.top if file not in listed)
        return sorted(file for file in found if file.startswith(self._model) and file.endswith(_SUFFIX))

    def _told_by_names(self, files: list[str], known: list[Found]) -> list[Found]:
        """The tensors of files, by their names alone."""
        paths = {_parts(each): each.path for each in known}
        result = []
        for file in files:
            name = file.removesuffix(_SUFFIX).removeprefix(self._model).removeprefix(".")
            if (split := _FILE.fullmatch(name)) is None:
                continue
            rest = split[3] or ""
            path = paths.get((_pattern(split[1]), split[2], rest), _path(split[2], rest))
            result.append(self._stored(file, Found(split[1], split[2].partition("_")[0], path)))
        return result


@lru_cache(1024)
def _sizes(text: str) -> tuple[int, ...]:
    shape = _SHAPE.fullmatch(text)
    return tuple(int(each) for each in shape[1].split(",") if each.strip()) if shape else ()


def _parts(found: Found) -> tuple[str, str, str]:
    """What a tensor's file is called by: the module without its layer's number, the side, the keys."""
    side = "outputs"
    if found.direction == "inputs":
        side = "inputs_args" if found.path and isinstance(found.path[0], int) else "inputs_kwargs"
    return _pattern(found.module), side, "_".join(map(str, found.path))


@lru_cache(4096)
def _pattern(module: str) -> str:
    return _LAYER.sub(r"\1*\3", module, count=1)


def _path(side: str, rest: str) -> Path:
    """The keys in a file's name that no other layer explains: numbers at its end are places."""
    parts: list[PathKey] = []
    while found := re.fullmatch(r"(?:(.*)_)?(\d{1,4})", rest):
        parts.insert(0, int(found[2]))
        rest = found[1] or ""
    return (rest, *parts) if rest else tuple(parts)


def _merged(known: list[Found], more: list[Found]) -> list[Found]:
    """The layers that the tree leaves out, before its last one, each in the order of its first one."""
    order = {_parts(each): place for place, each in reversed(list(enumerate(known)))}
    layers: dict[str, list[Found]] = {}
    last: list[Found] = []
    for each in more:
        split = _LAYER.fullmatch(each.module)
        (last if split is None else layers.setdefault(split[1], [])).append(each)
    result = list(known)
    for prefix, found in layers.items():
        found.sort(key=lambda each: (_number(each.module), order.get(_parts(each), len(known))))
        places = [
            place
            for place, each in enumerate(result)
            if each.module.startswith(prefix) and _number(each.module) > _number(found[-1].module)
        ]
        place = min(places, default=len(result))
        result[place:place] = found
    return result + last


@lru_cache(4096)
def _number(module: str) -> int:
    split = _LAYER.fullmatch(module)
    return int(split[2]) if split else -1
