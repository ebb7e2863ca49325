"""Operators in a comparison: in which of them a difference was born, and what would show it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import ReadError
from ..layout.directions import is_operator
from ..reader import Run
from ..reader.operator import Operator
from ..record import Json
from .origin import Seen


@dataclass(frozen=True, slots=True)
class Used:
    """The operator of each run that gave a tensor, None where that is not known.

    ``born`` is True where all of its inputs agree, False where one differs, None where not all were compared.
    With ``other`` they are those that only one run's code uses, from which the difference comes; a run whose
    code has none in that place has None.
    """

    a: Operator | None
    b: Operator | None
    born: bool | None
    other: bool = False

    def to_json(self) -> Json:
        """The functions and the lines that call them, in both runs, and whether only one run uses each."""
        sides = {"a": self.a, "b": self.b}
        found: Json = {
            side: None if each is None else {"function": each.function, "file": each.file, "line": each.line}
            for side, each in sides.items()
        }
        return {**found, "other_code": True} if self.other else found

    def __str__(self) -> str:
        if self.other:
            shown = [f"{label} uses {each or 'none there'}" for label, each in (("A", self.a), ("B", self.b))]
            return f"born where the code is another: {', '.join(shown)}"
        first = self.a or self.b
        also = "" if self.b is None or first is None or str(self.b) == str(first) else f" (in B {self.b})"
        return {
            True: f"born in {first}{also}: its inputs agree",
            False: f"passed on by {first}{also}: an input of it already differs",
            None: f"given by {first}{also}, not all of whose inputs were compared",
        }[self.born]


def used_for(result: Seen, runs: tuple[Run, Run], seen: Sequence[Seen]) -> Used | None:
    """What gave a tensor of an operator; None for any other tensor."""
    if not is_operator(result.direction):
        return None
    both = [operator_of(run, result.names[side], result.rank) for side, run in enumerate(runs)]
    born = [_born(each, side, result, runs[side], seen) for side, each in enumerate(both) if each is not None]
    known = False if False in born else None if None in born or not born else True
    if known is None:
        alone = [_alone(each, side, result, runs[side], seen) for side, each in enumerate(both)]
        if any(each is not None for each in alone):
            return Used(alone[0], alone[1], True, other=True)
    return Used(both[0], both[1], known)


def other_code_in(
    call: tuple[int, int, str, int], runs: tuple[Run, Run], seen: Sequence[Seen]
) -> Used | None:
    """The first operators of a call (step, rank, module, number) that only one run uses; None without any."""
    found: list[Operator | None] = []
    for side, run in enumerate(runs):
        own = [
            each
            for each in seen
            if (each.step, each.rank, each.module, each.call) == call
            and each.names[side] is not None
            and each.names[1 - side] is None
            and is_operator(each.direction)
        ]
        first = min(own, key=lambda each: int(each.direction.split(".")[1]), default=None)
        found.append(None if first is None else operator_of(run, first.names[side], first.rank))
    return None if found == [None, None] else Used(found[0], found[1], True, other=True)


def operator_of(run: Run, name: str | None, rank: int) -> Operator | None:
    """The operator that gave a run's tensor of a name; None where that is not known."""
    step, _, rest = (name or "").partition("/")
    try:
        opened = run.step(int(step.rpartition("_")[2]))
        direction = opened.record(name or "")["direction"]
        call = opened.call(rest.partition("/")[0], rank)
        return next((each for each in call.operators if each.direction == direction), None)
    except (ReadError, ValueError):
        return None


def _born(operator: Operator, side: int, result: Seen, run: Run, seen: Sequence[Seen]) -> bool | None:
    """Whether a side's operator was given only tensors that agree."""
    bad: dict[str, bool | None] = {}
    for each in _of_step(result, side, seen):
        # What has no rows of a request's own, has those of all of them.
        if None not in (each.request, result.request) and each.request != result.request:
            continue
        name = _told(run, each.names[side])
        bad[name] = _worse(bad.get(name, False), each.bad)
    given = [_differs(each, bad) for each in operator.operands()]
    return False if True in given else None if None in given else True


def _alone(
    operator: Operator | None, side: int, result: Seen, run: Run, seen: Sequence[Seen]
) -> Operator | None:
    """The first of the operators that only this side's code uses and whose results an operator was given."""
    alone = {
        _told(run, each.names[side]): each
        for each in _of_step(result, side, seen)
        if each.names[1 - side] is None and is_operator(each.direction)
    }
    first: Operator | None = None
    while operator is not None:
        given = (alone.pop(str(each.get("from")), None) for each in operator.operands())
        source = next((each for each in given if each is not None), None)
        operator = None if source is None else operator_of(run, source.names[side], source.rank)
        first = operator or first
    return first


def _of_step(result: Seen, side: int, seen: Sequence[Seen]) -> Iterator[Seen]:
    """What a side has of a result's step and rank."""
    step = (result.names[side] or "").partition("/")[0]
    for each in seen:
        if (each.names[side] or "").partition("/")[0] == step and each.rank == result.rank and step:
            yield each


def _told(run: Run, name: str | None) -> str:
    """A tensor's name as an operator has it: without its step and device."""
    step, _, rest = (name or "").partition("/")
    record = run.step(int(step.rpartition("_")[2])).record(name or "")
    path = "".join(f"_{key}" for key in record["path"])
    return f"{rest.partition('/')[0]}/{record['direction']}{path}"


def _worse(one: bool | None, other: bool | None) -> bool | None:
    """Whether any of two differs; None where that is not known."""
    return True if True in (one, other) else None if None in (one, other) else False


def _differs(operand: Json, bad: dict[str, bool | None]) -> bool | None:
    if operand.get("changed_since") or "unknown" in operand:
        return None
    return bad.get(operand["from"]) if "from" in operand else False


def advice(module: str) -> str:
    """Which configuration would show the operators of a module."""
    pattern = json.dumps(f"^{re.escape(module)}$")
    return f'to see in which operator and line, capture both again with "ops": [{pattern}]'
