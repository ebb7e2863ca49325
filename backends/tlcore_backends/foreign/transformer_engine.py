"""What TransformerEngine's ``DumpTensors`` writes: a file for each tensor of a layer and iteration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from tlcore.errors import ReadError
from tlcore.protocols import StepRanks
from tlcore.record import Json

from .documents import Found, in_model_order
from .dotted_names import dotted
from .files import DumpFiles
from .plain import described
from .source import ForeignSource
from .torch_files import torch_file

_FOLDER = "tensor_dumps"
_RANK = re.compile(r"rank_(\d{1,6})")
_ITERATION = re.compile(r"iter_(\d{1,12})")
_SUFFIX = ".pt"
# Earlier releases put all iterations of a rank into one directory.
_FLAT = re.compile(r"(.+)_iter_(\d{1,12})\.pt", re.DOTALL)
_HIGH, _QUANTIZED = "high_precision", "quantized"
# What a tensor of a layer is: its direction, and which argument. A parameter's has no direction of its own.
_KINDS = {
    "activation": ("inputs", (0,)),
    "output": ("outputs", ()),
    "gradient": ("grad_outputs", ()),
    "dgrad": ("grad_inputs", (0,)),
    "weight": ("", ()),
    "wgrad": ("grad_", ()),
}
_NAMED = re.compile(rf"(.+)_({'|'.join(_KINDS)})", re.DOTALL)


class _Iteration(NamedTuple):
    """Where the files of an iteration lie: all of a directory, or those of these names."""

    place: str
    names: tuple[str, ...] | None

    def files(self, files: DumpFiles) -> list[str]:
        """The names of all of them."""
        own = files.files_in(self.place) if self.names is None else self.names
        return sorted(name for name in own if name.endswith(_SUFFIX))


class TransformerEngine(ForeignSource):
    """A layer's activation is its argument; weights are modules called ``param.<layer>.weight``.

    In files' names a layer's dots are underscores; where they were is guessed. What is quantized can be read
    by TransformerEngine alone and counts as skipped, beside the tensor in high precision, under the layer's
    name with ``.quantized`` behind it.
    """

    tool = "transformer-engine"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """The log's directory, that of the dumps in it, of a rank, or of an iteration."""
        ranks = _ranks(files)
        iterations = [each for place in ranks.values() for each in _iterations(files, place).values()]
        # Whatever lies in a directory of such a name alone.
        alone = not any(ranks.values()) and all(
            each.names is not None or not each.place for each in iterations
        )
        if not iterations:
            return f"has {_FOLDER}, but no rank_<r>/iter_<n> in it" if _FOLDER in files.directories else None
        names = [name for each in iterations for name in each.files(files)]
        if not names:
            return None if alone else f"has {iterations[0].place}, but no tensor in it"
        try:
            value = torch_file(files, names[0], _size(files, names[0])).value
        except ReadError as error:
            return None if alone else str(error)
        if not isinstance(value, dict) or not {_HIGH, _QUANTIZED} & value.keys():
            other = f"{names[0]}: has neither {_HIGH} nor {_QUANTIZED}, as a dump of TransformerEngine has"
            return None if alone else other
        return {"world_size": max(ranks) + 1}

    @classmethod
    def passed_over(cls, files: DumpFiles) -> list[str]:
        """Those of a rank whose names tell no iteration, where it has no directory."""
        names = [name for place in _ranks(files).values() if place for name in files.files_in(place)]
        return [name for name in names if name.endswith(_SUFFIX) and not _FLAT.fullmatch(name)]

    @cached_property
    def _iterations(self) -> Mapping[int, Mapping[int, _Iteration]]:
        """Those of each rank."""
        return {rank: _iterations(self.files, place) for rank, place in _ranks(self.files).items()}

    @cached_property
    def steps(self) -> Mapping[int, StepRanks]:
        """The iterations, with the ranks that have them."""
        numbers = sorted({number for each in self._iterations.values() for number in each})
        return {
            number: StepRanks(frozenset(rank for rank, each in self._iterations.items() if number in each))
            for number in numbers
        }

    def found(self, step: int, rank: int) -> list[Found]:
        """The tensors in the order of a model: that in which they came about is not told."""
        names = self._iterations[rank][step].files(self.files)
        return in_model_order(each for name in names for each in self._tensors(name))

    def _tensors(self, name: str) -> Iterator[Found]:
        file = name.rpartition("/")[2]
        flat = _FLAT.fullmatch(file)
        stem = flat[1] if flat else file.removesuffix(_SUFFIX)
        named = _NAMED.fullmatch(stem)
        layer, kind = (named[1], named[2]) if named else (stem, "output")
        layer = dotted(layer)
        direction, path = _KINDS[kind]
        module = layer
        if direction in ("", "grad_"):
            module, direction = f"param.{layer}.weight", f"{direction}outputs"
        opened = torch_file(self.files, name, _size(self.files, name))
        for keys, leaf in opened.leaves():
            if (each := described(opened, leaf)) is None:
                continue
            if keys[:1] == (_HIGH,):
                yield each._replace(module=module, direction=direction, path=(*path, *keys[1:]))
            else:
                beside = f"{module}.{keys[0]}" if keys else module
                yield each._replace(module=beside, direction=direction, path=(*path, *keys[1:]))


def _ranks(files: DumpFiles) -> dict[int, str]:
    """The directory of each rank; of one that was opened alone it is the dump itself."""
    top = [name for name in files.directories if _RANK.fullmatch(name)]
    if not top and _FOLDER in files.directories:
        top = [name for name in files.directories_in(_FOLDER) if _RANK.fullmatch(name.rpartition("/")[2])]
    found = {int(name.rpartition("_")[2]): name for name in top}
    return dict(sorted(found.items())) or {0: ""}


def _iterations(files: DumpFiles, place: str) -> dict[int, _Iteration]:
    below = files.directories_in(place) if place else files.directories
    found = {name: _ITERATION.fullmatch(name.rpartition("/")[2]) for name in below}
    apart = {int(number[1]): _Iteration(name, None) for name, number in found.items() if number}
    flat: dict[int, list[str]] = {}
    for name in files.files_in(place):
        if (number := _FLAT.fullmatch(name.rpartition("/")[2])) is not None:
            flat.setdefault(int(number[2]), []).append(name)
    together = {number: _Iteration(place, tuple(names)) for number, names in flat.items()}
    if not place and not apart and not together:
        # One that was opened alone.
        own = _ITERATION.fullmatch(files.url.rstrip("/").rpartition("/")[2])
        return {} if own is None else {int(own[1]): _Iteration("", None)}
    return dict(sorted({**together, **apart}.items()))


def _size(files: DumpFiles, name: str) -> int:
    return files.files_in(name.rpartition("/")[0]).get(name, 0)
