"""What SGLang's ``dumper`` writes, also within Megatron: a file a tensor, its tags in the file's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tlcore.errors import ReadError
from tlcore.layout.names import PathKey
from tlcore.protocols import StepRanks
from tlcore.record import Json

from .documents import Found
from .files import DumpFiles, StoredAt
from .parallel import part_of, places
from .pickled import plain
from .plain import described, located
from .request_rows import Batch, request_rows, vector
from .source import ForeignSource
from .torch_files import TorchFile, torch_file

_SUFFIX = ".pt"
_STEPS = ("step", "forward_pass_id", "curr_step")
# Tags that do not tell tensors of one name apart.
_COMMON = frozenset((*_STEPS, "rank", "dump_index", "name", "recompute_status"))
_PARALLEL = re.compile(r"(?:pp|tp|cp|ep|etp)_rank")
_HOOKED = "non_intrusive__"
_GRADIENT = "grad__"
_PARAMETER = "param__"
_BATCH = ("input_ids", "positions", "seq_lens", "req_pool_indices", "rids")
# Nobody opens a directory of more dumps than that.
_LOOKED_AT = 20


class _File(NamedTuple):
    """A file of the dump, as its name tells it."""

    name: str
    step: int
    rank: int
    order: int
    tags: Mapping[str, str]


class SglangDumper(ForeignSource):
    """Tensors that hooks dumped have their modules' names, the batch is the model's arguments.

    What code dumped by a name of its own is the result of a module of that name, in its layer where the
    dumper knew one; gradients lie beside the values, parameters are modules called ``param.<name>``.
    """

    tool = "sglang-dumper"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """A directory of such files, or one that holds one such directory."""
        directories = _experiments(files)
        if len(directories) > 1:
            return f"holds several dumps of SGLang's dumper ({', '.join(directories)}): open one of them"
        names = [name for each in directories for name in files.files_in(each) if "___" in name]
        if not names:
            return None
        first = next((each for each in map(_parsed, sorted(names)) if each is not None), None)
        if first is None:
            return f"{min(names)}: has tags in its name, but no {_lacking(min(names))}"
        try:
            torch_file(files, first.name, files.files_in(directories[0])[first.name])
        except ReadError as error:
            return str(error)
        # How many there were may be told, but the dumps of the others may well have been filtered out.
        by_rank = {each.rank: each for each in map(_parsed, sorted(names, reverse=True)) if each is not None}
        found: Json = {"world_size": max(by_rank) + 1}
        if 1 < len(by_rank) == found["world_size"]:
            ranks = _ranks(files, directories[0], by_rank)
            found |= {} if ranks is None else {"ranks": ranks}
        return found

    @classmethod
    def passed_over(cls, files: DumpFiles) -> list[str]:
        """Those in whose names a tag is missing."""
        return [name for name in _saved(files, _experiments(files)[0]) if _parsed(name) is None]

    @cached_property
    def _directory(self) -> str:
        return _experiments(self.files)[0]

    @cached_property
    def _files(self) -> Mapping[tuple[int, int], Sequence[_File]]:
        """The files of each step and rank in the order in which they were written."""
        found: dict[tuple[int, int], list[_File]] = {}
        for name in self.files.files_in(self._directory):
            if (each := _parsed(name)) is not None:
                found.setdefault((each.step, each.rank), []).append(each)
        return {key: sorted(each, key=lambda file: file.order) for key, each in sorted(found.items())}

    @cached_property
    def steps(self) -> Mapping[int, StepRanks]:
        """The steps, with the ranks that dumped anything in them."""
        ranks: dict[int, set[int]] = {}
        for step, rank in self._files:
            ranks.setdefault(step, set()).add(rank)
        return {step: StepRanks(frozenset(each)) for step, each in ranks.items()}

    def found(self, step: int, rank: int) -> list[Found]:
        """The tensors of all files, in the order in which they were dumped."""
        return [each for file in self._files[step, rank] for each in self._tensors(file)]

    def _tensors(self, file: _File) -> Iterator[Found]:
        opened = self._opened(file)
        whole = _whole(opened.value)
        meta = {} if whole else _meta(opened)
        for path, leaf in opened.leaves():
            if whole or path[:1] == ("value",):
                each = described(opened, leaf)
                if each is not None:
                    key = "dims_grad" if file.tags["name"].startswith(_GRADIENT) else "dims"
                    part = part_of(meta.get(key), each.shape)
                    yield _named(file.tags, path if whole else path[1:], each._replace(part=part))

    def _opened(self, file: _File) -> TorchFile:
        size = self.files.files_in(self._directory)[file.name]
        return torch_file(self.files, file.name, size)

    def rows(self, step: int, rank: int) -> Sequence[Json] | None:
        """Each request's rows, where the batch was dumped."""
        if rank not in self._rows:
            batches = (
                (number, self._batch(files))
                for (number, owner), files in self._files.items()
                if owner == rank
            )
            self._rows[rank] = request_rows(batches)
        return self._rows[rank].get(step)

    @cached_property
    def _rows(self) -> dict[int, Mapping[int, Sequence[Json] | None]]:
        return {}

    def _batch(self, files: Sequence[_File]) -> Batch | None:
        by_name = {file.tags["name"]: file for file in files if file.tags["name"] in _BATCH[1:]}
        positions, lengths = (self._vector(by_name.get(name)) for name in ("positions", "seq_lens"))
        if positions is None or lengths is None:
            return None
        if (names := self._names(by_name.get("rids"))) is not None:
            return Batch(positions, lengths, names)
        slots = self._vector(by_name.get("req_pool_indices"))
        return Batch(positions, lengths, None if slots is None else [str(each) for each in slots], True)

    def _vector(self, file: _File | None) -> list[int] | None:
        found = [] if file is None else [each for each in self._tensors(file) if each.place is not None]
        if file is None or len(found) != 1 or "strides" in (found[0].place or {}):
            return None
        at = (found[0].place or {})["at"]
        return vector(self.files, StoredAt(file.name, at, found[0].dtype, found[0].shape))

    def _names(self, file: _File | None) -> list[str] | None:
        if file is None:
            return None
        value = self._opened(file).value
        value = plain(value["value"]) if not _whole(value) else plain(value)
        sound = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return list(value) if sound else None


def _saved(files: DumpFiles, directory: str) -> list[str]:
    return [name for name in files.files_in(directory) if name.endswith(_SUFFIX)]


def _parsed(name: str) -> _File | None:
    """What a file's name tells; None where it lacks what every name has."""
    stem = name.rpartition("/")[2]
    if not stem.endswith(_SUFFIX):
        return None
    tags: dict[str, str] = {}
    key = ""
    for part in stem.removesuffix(_SUFFIX).split("___"):
        before, equals, after = part.partition("=")
        if equals:
            key = before
            tags[key] = after
        elif key:
            # A name may have the separator in it.
            tags[key] += f"___{part}"
    step = next((tags[each] for each in _STEPS if each in tags), "")
    numbers = [_number(each) for each in (step, tags.get("rank", ""), tags.get("dump_index", ""))]
    if any(each is None for each in numbers) or not tags.get("name"):
        return None
    at, rank, index = (each or 0 for each in numbers)
    return _File(name, at, rank, index, tags)


def _lacking(name: str) -> str:
    """Which of the tags that every file has stand not in a name, or make no sense there."""
    stem = name.rpartition("/")[2].removesuffix(_SUFFIX)
    tags = dict(part.partition("=")[::2] for part in stem.split("___"))
    step = next((each for each in _STEPS if each in tags), _STEPS[0])
    numbers = [each for each in (step, "rank", "dump_index") if _number(tags.get(each, "")) is None]
    return ", ".join(f"{each}=" for each in (*numbers, *(() if tags.get("name") else ("name",)))) or _SUFFIX


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _named(tags: Mapping[str, str], path: tuple[PathKey, ...], found: Found) -> Found:
    """A tensor as what its name says that it is."""
    name = tags["name"]
    gradient = name.startswith(_GRADIENT)
    name = name.removeprefix(_GRADIENT)
    if name.startswith(_HOOKED):
        key = name.removeprefix(_HOOKED)
        # Of the model itself there is no name before its arguments.
        each = located(f".{key}" if key.partition(".")[0] in ("inputs", "output") else key, path, found)
    elif name in _BATCH:
        each = found._replace(module="", direction="inputs", path=(name, *path))
    elif name.startswith(_PARAMETER):
        each = found._replace(module=f"param.{name.removeprefix(_PARAMETER)}", direction="outputs", path=path)
    else:
        module = f"layers.{tags['layer_id']}.{name}" if tags.get("layer_id", "").isdigit() else name
        more = [
            f"{key}={value}"
            for key, value in tags.items()
            if key not in _COMMON and key != "layer_id" and not _PARALLEL.fullmatch(key)
        ]
        each = found._replace(module=".".join([module, *more]), direction="outputs", path=path)
    return each._replace(direction=f"grad_{each.direction}") if gradient else each


def _meta(opened: TorchFile) -> Mapping[str, Any]:
    """What a file tells of its tensor; nothing where it has the tensor alone."""
    value = plain(opened.value)
    found = plain(value["meta"]) if not _whole(opened.value) else {}
    return found if isinstance(found, dict) else {}


def _ranks(files: DumpFiles, directory: str, by_rank: Mapping[int, _File]) -> list[Json] | None:
    """Each rank's place in the groups that share the model, as a file of its own tells it."""
    told: dict[int, Any] = {}
    for rank, file in by_rank.items():
        try:
            meta = _meta(torch_file(files, file.name, files.files_in(directory)[file.name]))
        except ReadError:
            return None
        told[rank] = plain(meta.get("sglang_parallel_info") or meta.get("megatron_parallel_info"))
    return places(told, len(by_rank))


def _whole(value: Any) -> bool:
    """Whether the file has the value alone, as older ones have, without what is known of it."""
    return not isinstance(plain(value), dict) or not {"value", "meta"} <= plain(value).keys()


def _experiments(files: DumpFiles) -> list[str]:
    """The directories whose files are such a dump: the dump itself, else those in it."""
    if any(_parsed(name) for name in files.top):
        return [""]
    some = [each for each in files.directories[:_LOOKED_AT] if any(map(_parsed, files.files_in(each)))]
    if some or not any("___" in name for name in files.top):
        return some
    return [""]
