"""Functions that put values of an index together, each made once for a skeleton, whose integers it finds."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

# What stands in a value as in its skeleton.
CONSTANT = frozenset((float, str, bool, type(None)))
# From all integers of a value to the value.
Build = Callable[[list[int]], Any]


def builder(skeleton: Any) -> Build:
    """What does for this skeleton as `compact.joined` does. Raises RecursionError for one nested too deep."""
    return _builder(skeleton, 0)[0]


def _builder(node: Any, at: int) -> tuple[Build, int]:
    """The function for a node whose integers begin at ``at``, and where those of the next one begin."""
    if type(node) is int:
        return itemgetter(at), at + 1
    if isinstance(node, dict):
        return _of_object(node, at)
    if isinstance(node, list):
        return _of_list(node, at)
    return lambda numbers: node, at


def _of_object(node: dict[str, Any], at: int) -> tuple[Build, int]:
    inner = {key: each for key, each in node.items() if isinstance(each, (dict, list))}
    if not inner:
        keys = [key for key, each in node.items() if type(each) is int]
        end = at + len(keys)
        return lambda numbers: {**node, **dict(zip(keys, numbers[at:end], strict=True))}, end
    builds: list[tuple[str, Build]] = []
    for key, each in node.items():
        build, at = _builder(each, at)
        builds.append((key, build))
    return lambda numbers: {key: build(numbers) for key, build in builds}, at


def _of_list(node: list[Any], at: int) -> tuple[Build, int]:
    types = list(map(type, node))
    if types.count(int) == len(node):
        end = at + len(node)
        return lambda numbers: numbers[at:end], end
    if CONSTANT.issuperset(types):
        return lambda numbers: node[:], at
    builds: list[Build] = []
    for each in node:
        build, at = _builder(each, at)
        builds.append(build)
    return lambda numbers: [build(numbers) for build in builds], at
