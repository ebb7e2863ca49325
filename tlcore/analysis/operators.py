"""Operators in a comparison: in which of them a difference was born, and what would show it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
    """

    a: Operator | None
    b: Operator | None
    born: bool | None

    def to_json(self) -> Json:
        """The functions and the lines that call them, in both runs."""
        sides = {"a": self.a, "b": self.b}
        return {
            side: None if each is None else {"function": each.function, "file": each.file, "line": each.line}
            for side, each in sides.items()
        }

    def __str__(self) -> str:
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
    both = [
        operator_of(run, result.names[side], result.rank, result.direction) for side, run in enumerate(runs)
    ]
    born = [_born(each, side, result, seen) for side, each in enumerate(both) if each is not None]
    known = False if False in born else None if None in born or not born else True
    return Used(both[0], both[1], known)


def operator_of(run: Run, name: str | None, rank: int, direction: str) -> Operator | None:
    """The operator that gave a run's tensor of a name; None where that is not known."""
    step, _, rest = (name or "").partition("/")
    try:
        call = run.step(int(step.rpartition("_")[2])).call(rest.partition("/")[0], rank)
        return next((each for each in call.operators if each.direction == direction), None)
    except (ReadError, ValueError):
        return None


def _born(operator: Operator, side: int, result: Seen, seen: Sequence[Seen]) -> bool | None:
    """Whether a side's operator was given only tensors that agree."""
    step = (result.names[side] or "").partition("/")[0]
    bad: dict[str, bool | None] = {}
    for each in seen:
        found, _, rest = (each.names[side] or "").partition("/")
        if found != step or each.rank != result.rank:
            continue
        # What has no rows of a request's own, has those of all of them.
        if None not in (each.request, result.request) and each.request != result.request:
            continue
        path = "".join(f"_{key}" for key in each.path)
        name = f"{rest.partition('/')[0]}/{each.direction}{path}"
        bad[name] = _worse(bad.get(name, False), each.bad)
    given = [_differs(each, bad) for each in operator.operands()]
    return False if True in given else None if None in given else True


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
