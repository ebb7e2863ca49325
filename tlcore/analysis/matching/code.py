"""Operators of two codes: which of one is which of the other, where one uses some that the other does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from ...errors import ReadError
from ...layout.directions import is_operator
from ...reader import Step
from ...reader.operator import Operator
from .pairs import Key, Located

_Call = tuple[int, str, int]
_Code = tuple[dict[_Call, dict[str, list[Key]]], Mapping[Key, Located], Sequence[Step]]


def aligned(
    mine: Mapping[Key, Located],
    theirs: Mapping[Key, Located],
    steps: tuple[Sequence[Step], Sequence[Step]],
) -> dict[Key, Key]:
    """New keys of B's operators in calls whose code is another than in A: A's, or what no tensor of A has."""
    sides = (_by_call(mine), mine, steps[0]), (_by_call(theirs), theirs, steps[1])
    found: dict[Key, Key] = {}
    for call, operators in sides[0][0].items():
        others = sides[1][0].get(call, {})
        if others and _names(operators) != _names(others):
            found.update(_renames(operators, others, _pairs(_forms(sides[0], call), _forms(sides[1], call))))
    return found


def _by_call(found: Mapping[Key, Located]) -> dict[_Call, dict[str, list[Key]]]:
    """The keys of operators by call and direction, in the order of the code."""
    calls: dict[_Call, dict[str, list[Key]]] = defaultdict(lambda: defaultdict(list))
    for key in found:
        if is_operator(key[3]):
            calls[key[:3]][key[3]].append(key)
    return {
        call: dict(sorted(each.items(), key=lambda item: _number(item[0]))) for call, each in calls.items()
    }


def _number(direction: str) -> int:
    return int(direction.split(".")[1])


def _names(directions: Mapping[str, Any]) -> list[str]:
    return [each.split(".", 2)[2] for each in directions]


def _forms(code: _Code, call: _Call) -> list[tuple[str, str]]:
    """Of each operator its name, and what it takes: numbers, parameters, results of other modules."""
    calls, located, steps = code
    operators = calls[call]
    source = located[next(iter(operators.values()))[0]]
    step = next(each for each in steps if each.number == source.step)
    directory = source.names[0].split("/")[1]
    try:
        known = {each.direction: each for each in step.call(directory, call[0]).operators}
    except ReadError:
        known = {}
    return [
        (name, _form(known.get(direction), directory))
        for direction, name in zip(operators, _names(operators), strict=True)
    ]


def _form(operator: Operator | None, directory: str) -> str:
    if operator is None:
        return ""
    texts = [operator.function]
    for each in operator.operands():
        kind, text = next(iter(each.items()))
        if kind == "from" and str(text).startswith(f"{directory}/op."):
            text = "an operator's"
        texts.append(f"{kind} {text}")
    return "\n".join(texts)


def _pairs(mine: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """Which operators are the same: alike in what they take, else between these by their names alone."""
    matcher = SequenceMatcher(None, mine, theirs, autojunk=False)
    for kind, begin, end, other, until in matcher.get_opcodes():
        if kind == "equal":
            yield from zip(range(begin, end), range(other, until), strict=True)
        elif kind == "replace":
            names = [[name for name, _ in part] for part in (mine[begin:end], theirs[other:until])]
            for block in SequenceMatcher(None, names[0], names[1], autojunk=False).get_matching_blocks():
                yield from ((begin + block.a + at, other + block.b + at) for at in range(block.size))


def _renames(
    mine: Mapping[str, list[Key]], theirs: Mapping[str, list[Key]], pairs: Iterator[tuple[int, int]]
) -> Iterator[tuple[Key, Key]]:
    goals = list(mine)
    of = {other: goals[own] for own, other in pairs}
    for place, (direction, keys) in enumerate(theirs.items()):
        goal = of.get(place)
        for key in keys:
            if goal is not None:
                yield key, (*key[:3], goal, key[4])
            elif direction in mine:
                yield key, (*key[:4], (*key[4], "unpaired"))
