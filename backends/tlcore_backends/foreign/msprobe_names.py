"""msprobe's files by their names alone: a run may end before their ``dump.json`` is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from tlcore.errors import ReadError
from tlcore.layout.names import PathKey

from .documents import Found, in_model_order

_NAME = re.compile(r"(.+)\.(input|kwargs|output|parameters)\.(.+)\.(?:pt|npy)", re.DOTALL)
_GRADIENT = re.compile(r"(.+\.parameters_grad\.\d{1,9})\.(.+)\.(?:pt|npy)", re.DOTALL)
_SUFFIXES = (".pt", ".npy")
# An entry's module, kind and call.
Entry = tuple[str, str, int]
Path = tuple[PathKey, ...]


def told_by_names(
    folder: str, names: Iterable[str], entry: Callable[[str], Entry], look: Callable[[str], Found]
) -> list[Found]:
    """The tensors of files in a folder; ``look`` opens one. What is not whole is skipped."""
    found = [(name, _found(name, entry)) for name in sorted(names) if name.endswith(_SUFFIXES)]
    results = [each for _, each in found if each.direction in _RESULTS and each.path]
    several = {(each.module, each.call) for each in results if each.path[0] != 0}
    return in_model_order(_looked_at(f"{folder}/{name}", _alone(each, several), look) for name, each in found)


def _found(name: str, entry: Callable[[str], Entry]) -> Found:
    if (named := _GRADIENT.fullmatch(name)) is not None:
        module, _, call = entry(named[1])
        return Found(f"param.{module}.{named[2]}", "grad_outputs", (), call=call)
    if (named := _NAME.fullmatch(name)) is None:
        # Such as what was saved by hand: `<name>.<number>.debug`.
        return Found(name.rpartition(".")[0], "outputs", ())
    module, kind, call = entry(named[1])
    if named[2] == "parameters":
        return Found(f"param.{module}.{named[3]}", "outputs", (), call=call)
    given = named[2] != "output"
    direction = "inputs" if given else "outputs"
    if kind == "backward":
        # What a backward is given are gradients of results.
        direction = "grad_outputs" if given else "grad_inputs"
    path: Path = tuple(int(part) if part.isdecimal() else part for part in named[3].split("."))
    return Found(module, direction, path, call=call)


_RESULTS = ("outputs", "grad_outputs")


def _alone(each: Found, several: set[tuple[str, int]]) -> Found:
    """A result that is alone stands in a list, too."""
    if each.direction in _RESULTS and each.path and (each.module, each.call) not in several:
        return each._replace(path=each.path[1:])
    return each


def _looked_at(file: str, each: Found, look: Callable[[str], Found]) -> Found:
    try:
        at = look(file)
    except ReadError:
        return each._replace(skipped="its file is damaged, or was not written to its end")
    return each._replace(dtype=at.dtype, shape=at.shape, place={"tensor": file})
