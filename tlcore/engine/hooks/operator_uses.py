"""The operators that one call of a module uses, in order, as they were in the step before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from ...layout.directions import operator_direction
from ...layout.structure import TreeSpec
from ..calls import Call, CallSide, Operand, Operator, Sides
from .functions_of_torch import Function
from .operands import Operands

# One that is called by other lines, or with other numbers, in each step must not fill the memory.
_MOST_USES = 16
_LISTED = ".0"


class Planned(NamedTuple):
    """One use of an operator that gives a tensor, which is expected again at the same place."""

    func: Any
    function: Function
    code: CodeType
    instruction: int
    args: tuple[Any, ...]
    inputs: tuple[Operand, ...]
    keys: tuple[str, ...]
    kwargs: tuple[Any, ...]
    keywords: tuple[Operand, ...]
    direction: str
    place: Operand
    known: Sides
    make: Callable[[TreeSpec], CallSide]

    def is_used_again(
        self, at: FrameType, operands: Operands, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call of the same function comes from the same line, with the same inputs."""
        return (
            at.f_code is self.code
            and at.f_lasti == self.instruction
            and operands.are_still(args, self.args, self.inputs)
            and (
                (not kwargs and not self.keys)
                or (
                    tuple(kwargs) == self.keys
                    and operands.are_still(tuple(kwargs.values()), self.kwargs, self.keywords)
                )
            )
        )


class Uses:
    """The operators that one call of a module uses: ``count`` of them in this step so far.

    ``planned`` are those of the steps before, each None where it was not captured or gave no plain tensor.
    """

    __slots__ = ("_known", "_places", "call", "count", "planned")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.count = 0
        self.planned: list[Planned | None] = []
        self._known: dict[str, dict[Operator, Sides]] = {}
        self._places: dict[tuple[int, str], tuple[str, str]] = {}

    def next_place(self, name: str) -> tuple[str, str]:
        """The direction of the next one, and how others refer to what it gives."""
        key = self.count, name
        self.count += 1
        found = self._places.get(key)
        if found is None:
            direction = operator_direction(name, key[0])
            found = self._places[key] = direction, f"{self.call.directory}/{direction}"
        return found

    def sides(self, direction: str, operator: Operator) -> tuple[Sides, Callable[[TreeSpec], CallSide]]:
        """The sides of one use of an operator by structure, and what makes another."""
        uses = self._known.setdefault(direction, {})
        known = uses.get(operator)
        if known is None:
            if len(uses) >= _MOST_USES:
                uses.clear()
            known = uses[operator] = {}

        def make(treespec: TreeSpec) -> CallSide:
            side = self.call.add(known, treespec, direction, treespec, None)
            side.operator = operator
            return side

        return known, make

    def plan(self, planned: Planned | None) -> None:
        """Expect the last one again at the same place."""
        place = self.count - 1
        if place < len(self.planned):
            self.planned[place] = planned
        elif place == len(self.planned):
            self.planned.append(planned)


class Running:
    """A call of a listened module while it runs; ``uses`` is None where its operators are not captured.

    ``codes`` is its module's own code, by id, and `is_own` tells calls that come from there.
    """

    __slots__ = ("codes", "known", "module", "uses")

    def __init__(self, module: torch.nn.Module, codes: dict[int, CodeType]) -> None:
        self.module = module
        self.codes = codes
        self.known = False
        self.uses: Uses | None = None

    def learn(self, code: CodeType, uses: Uses | None) -> None:
        """What its own ``forward`` uses. Another method may be another module's that is called directly."""
        if code.co_name == "forward":
            self.codes[id(code)] = code
            self.known, self.uses = True, uses

    def is_own(self, frame: FrameType | None, functions: dict[int, CodeType]) -> bool:
        """Whether a frame is that of the module's own code, or of plain functions that this has called."""
        while frame is not None:
            code = frame.f_code
            key = id(code)
            if key in self.codes:
                return True
            if key not in functions:
                if not _is_plain_function(code):
                    return False
                functions[key] = code
            frame = frame.f_back
        return False


def _is_plain_function(code: CodeType) -> bool:
    """Whether code is certainly no method of a module."""
    if code.co_argcount and code.co_varnames[0] == _LISTED:
        return True
    return sys.version_info >= (3, 11) and code.co_qualname == code.co_name and code.co_name != "<module>"
