"""What transformers' ``model_addition_debugger_context`` writes: a tree, and a file a tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size
from tlcore.layout.names import PathKey, within
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
_WRITTEN = re.compile(
    r"[A-Za-z_]\w*(?:\.[^/]+)?_(?:inputs_args|inputs_kwargs|outputs)(?:_[^/]+)?\.safetensors"
)
_LAYER = re.compile(r"(.*?\.)(\d+)(\..*|)", re.DOTALL)
_SHAPE = re.compile(r"torch\.Size\(\[([\d, ]*)\]\)")
_PRINTED = "only printed, not stored: the debugger ran with use_repr=True"
# Files up to here are read by one call.
_AT_ONCE = 1 << 20
_OVERWRITTEN = "overwritten by a later call of the module in the same forward"
_LEFT = "left by an earlier forward: the tree of the last one does not name it"
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
        return {"world_size": 1} if trees else _lacking(files)

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
        result = self._listed(named)
        beside = self._beside({file for file, _ in named})
        if not beside:
            return result
        return _merged(result, self._told_by_names(beside, result, _modules_of(tree, self._module)))

    def _listed(self, named: list[tuple[str, Found]]) -> list[Found]:
        """The tensors that the tree names, with the numbers of their calls, of which a file has the last."""
        counts = Counter([file for file, _ in named])
        if len({each[:3] for _, each in named}) == len(named) == len(counts) and "" not in counts:
            return [self._stored(file, each) for file, each in named]
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
        return result

    def _module(self, node: Json) -> str:
        module = str(node.get("module_path", "")).removesuffix(" (top-level)")
        return module.removeprefix(self._model).removeprefix(".")

    def _in_node(self, node: Json, depth: int, named: list[tuple[str, Found]]) -> None:
        """Each tensor of a call with its file (none if only printed), arguments, what is within, results."""
        if depth > 100 or not isinstance(node, dict):
            raise ReadError(f"{shown_path(self.files, self._tree_file)}: damaged, nested too deep or no tree")
        module = self._module(node)
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
        head, size, at = self._last_head
        if len(data) != size or data[: len(head)] != head:
            at = self._only(file, safetensors_that_begin(self.files, file, data, len(data))[0])
            # Most files of a dump begin alike, and are as long.
            self._last_head = bytes(data[: at.at]), len(data), at
        if at.dtype != record["dtype"] or [*at.shape] != record["shape"]:
            self._check(record, file, at)
        return data[at.at : at.at + record["bytes"]]

    @cached_property
    def _last_head(self) -> tuple[bytes, int, StoredAt]:
        """All before the values of the file that was read last, its size, and where its values lie."""
        return b"", -1, StoredAt("", 0, "", ())

    def _beside(self, listed: set[str]) -> list[str]:
        """The files of tensors that the tree does not name: layers in the middle, the model's results."""
        found = (file for file in self.files.top if file not in listed)
        return sorted(file for file in found if file.startswith(self._model) and file.endswith(_SUFFIX))

    def _told_by_names(
        self, files: list[str], known: list[Found], modules: Mapping[str, bool]
    ) -> list[Found]:
        """The tensors of files by their names; ``modules`` are those of the tree, True for leaves."""
        named = [(file, split) for file in files if (split := self._split(file)) is not None]
        # Where nothing follows the side, it is no container.
        deep = any(split[3] for _, split in named)
        paths = {_parts(each): each.path for each in known} if deep else {}
        result = []
        for file, split in named:
            rest = split[3] or ""
            path = paths.get((_pattern(split[1]), split[2], rest), _path(split[2], rest))
            found = Found(split[1], split[2].partition("_")[0], path)
            # Of these the tree names all that this forward has written.
            names_it = found.module in modules and (found.direction == "inputs" or modules[found.module])
            result.append(found._replace(skipped=_LEFT) if names_it else self._stored(file, found))
        return result

    def _split(self, file: str) -> re.Match[str] | None:
        """The parts of a file's name: module, side, keys."""
        return _FILE.fullmatch(file.removesuffix(_SUFFIX).removeprefix(self._model).removeprefix("."))


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
    """The layers that the tree leaves out, beside those that it has, each in the order of one of these."""
    there = {name for module in {each.module for each in known} for name in _around(module)}
    layers: dict[str, list[Found]] = {}
    last: list[Found] = []
    for each in more:
        prefix = _left_out(each.module, there)
        (last if prefix is None else layers.setdefault(prefix, [])).append(each)
    result = list(known)
    # Layers within layers first, so that those around them have them all.
    for prefix in sorted(layers, key=lambda name: -name.count(".")):
        found, order = layers[prefix], _Order(result, prefix, layers[prefix])
        found.sort(key=lambda each: (_number(each.module, prefix), order.of(each)))
        place = _place_among(result, prefix, _number(found[-1].module, prefix))
        result[place:place] = found
    return result + last


def _around(module: str) -> list[str]:
    """The names of a module and of all around it."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _left_out(module: str, there: set[str]) -> str | None:
    """What stands before the number of the outermost layer around a module that is not there, if any."""
    for name in _around(module):
        before, dot, number = name.rpartition(".")
        if dot and number.isdecimal() and name not in there:
            return f"{before}."
    return None


def _place_among(known: list[Found], prefix: str, number: int) -> int:
    """Before the layers behind layer ``number``, else behind those before it, else at the end."""
    places = [
        (place, _number(each.module, prefix))
        for place, each in enumerate(known)
        if each.module.startswith(prefix)
    ]
    after = [place for place, other in places if other > number]
    return min(after) if after else max((place + 1 for place, _ in places), default=len(known))


class _Order:
    """In which order a layer's tensors come: as in the known layer that has most of what ``found`` has."""

    def __init__(self, known: list[Found], prefix: str, found: list[Found]) -> None:
        self._prefix = prefix
        layers: dict[int, dict[tuple[str, str, str], int]] = {}
        for place, each in enumerate(known):
            if each.module.startswith(prefix):
                layers.setdefault(_number(each.module, prefix), {}).setdefault(self._key(each), place)
        wanted = set(map(self._key, found))
        self._known = max(layers.values(), key=lambda each: len(wanted & each.keys()), default={})

    def _key(self, each: Found) -> tuple[str, str, str]:
        below = each.module[len(self._prefix) :].partition(".")[2]
        return below, each.direction, "_".join(map(str, each.path))

    def of(self, each: Found) -> float:
        """A number that grows along the layer.

        What no layer is known to have comes behind what its module has else, or, if there is nothing,
        before or behind what is within that.
        """
        below, direction, _ = key = self._key(each)
        if key in self._known:
            return self._known[key]
        own = [place for known, place in self._known.items() if known[:2] == (below, direction)]
        if own:
            return max(own) + 0.5
        inside = [place for known, place in self._known.items() if within(known[0], below)]
        if not inside:
            return float("inf")
        return min(inside) - 0.5 if direction == "inputs" else max(inside) + 0.5


def _number(module: str, prefix: str) -> int:
    """The number of the layer that a module lies in, behind this beginning of its name."""
    number = module[len(prefix) :].partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _modules_of(tree: Json, name_of: Callable[[Json], str]) -> dict[str, bool]:
    """The modules of a tree, each with whether nothing was called within any of its calls."""
    found: dict[str, bool] = {}
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        children = node.get("children") or ()
        name = name_of(node)
        found[name] = found.get(name, True) and not children
        waiting += children
    return found


def _lacking(files: DumpFiles) -> str | None:
    """What is missing where there is only a summary, or a forward did not come to its end."""
    summaries = [name for name in files.top if name.endswith(_SUMMARY)]
    if summaries:
        return f"has {summaries[0]}, but no *{_TREE}"
    written = [name for name in files.top if _WRITTEN.fullmatch(name)]
    if len(written) < 2:
        return None
    return (
        f"has files such as {min(written)} of the transformers debugger, but no *{_TREE}, which it writes "
        "when the model's forward has ended: that raised, or still runs"
    )
