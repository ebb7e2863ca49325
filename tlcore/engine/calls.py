"""One call of a module in a step, and each of its sides: where its tensors were captured."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..hotpath.listening import KnownSides
from ..layout.directions import DIRECTIONS
from ..layout.structure import TreeSpec, count_leaves
from ..record import Direction

Operand = tuple[Any, ...]


class Operator(NamedTuple):
    """One use of an operator in a call: the function, the line that calls it, and where its inputs are from.

    Each of ``inputs``, and of the values of ``keywords``, is a pair of a kind and what it says.
    """

    name: str
    function: str
    file: str
    line: int
    inputs: tuple[Operand, ...]
    keywords: tuple[tuple[str, Operand], ...] = ()


# A call whose structure keeps changing must not fill the memory.
_MOST_STRUCTURES = 64


class CallSide:
    """One side (inputs, outputs, inputs afterwards) of one call, for one structure of its values.

    ``file`` is the name of its structure document in the step. ``keywords`` is the tree spec of keyword
    arguments, None for a result. ``begins`` says that a reader learns from this side of the call: the
    inputs, or what taps show of a call that is not captured else. ``operator`` is what gave these values,
    where that is no module.
    """

    __slots__ = (
        "begins",
        "call",
        "direction",
        "directory",
        "file",
        "keywords",
        "module",
        "operator",
        "scalars",
        "tensors",
        "treespec",
    )

    def __init__(
        self,
        module: str,
        call: int,
        directory: str,
        direction: Direction,
        treespec: TreeSpec,
        keywords: TreeSpec | None = None,
        begins: bool = False,
    ) -> None:
        self.begins = begins
        self.module = module
        self.call = call
        self.direction: Direction = direction
        self.file = f"{directory}/{direction}.json"
        both = [count_leaves(each) for each in (treespec, keywords) if each is not None]
        self.tensors = sum(tensors for tensors, _ in both)
        self.scalars = sum(scalars for _, scalars in both)
        self.directory = directory
        self.treespec = treespec
        self.keywords = keywords
        self.operator: Operator | None = None


Sides = dict[TreeSpec, CallSide]


class Call(KnownSides):
    """One call of a module in a step: its three sides, each with a side for every structure it has had.

    Arguments are found by the tree spec of the positional ones, or by a pair with that of the keywords.
    ``only_taps`` is a call of which nothing but its taps is captured.
    """

    __slots__ = ("call", "directory", "module", "only_taps", "others", "post_fwd_inputs")

    inputs: Sides
    outputs: Sides

    def __init__(self, module: str, call: int, directory: str, only_taps: bool = False) -> None:
        self.only_taps = only_taps
        self.module = module
        self.call = call
        self.directory = directory
        self.inputs = {}
        self.outputs = {}
        self.post_fwd_inputs: Sides = {}
        # Gradients, and taps that were planned.
        self.others: dict[str, Sides] = {}

    def sides_of(self, direction: Direction) -> Sides:
        """The sides of one direction."""
        if direction not in DIRECTIONS:
            return self.others.setdefault(direction, {})
        sides: Sides = getattr(self, direction)
        return sides

    def add(
        self,
        known: Sides,
        key: TreeSpec,
        direction: Direction,
        treespec: TreeSpec,
        keywords: TreeSpec | None,
    ) -> CallSide:
        """The side for a structure that this side has not had before."""
        if len(known) >= _MOST_STRUCTURES:
            known.clear()
        side = known[key] = self.side(direction, treespec, keywords)
        return side

    def side(self, direction: Direction, treespec: TreeSpec, keywords: TreeSpec | None = None) -> CallSide:
        """A side of this call."""
        begins = self.only_taps or direction == "inputs"
        return CallSide(self.module, self.call, self.directory, direction, treespec, keywords, begins)
