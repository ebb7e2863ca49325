"""How many times its noise a tensor's difference is, and which tensors are therefore different."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, cast, get_args

from ...errors import ReadError
from ..matching.pairs import Pair
from ..results import Noise, Status, TensorResult
from ..work import Operand, Task, opened
from .counterparts import Counterpart, Pieces
from .distance import Distance, distance

# What A, B and the further runs have of one piece of a tensor.
Item = tuple[Pair, Pieces, tuple[Counterpart, ...]]
Sizes = tuple[float, float, float]
By = Literal["norm", "row", "value"]
_BATCH = 32
# So many values that round the other way are chance, where the further runs have none.
_CHANCE = 9
# The standard normal deviate that is exceeded once in a hundred times, and what a quotient is at least.
_RARE, _LEAST = 2.33, 0.04
# By how many epsilons of the largest value one value may be off by chance.
_ROUNDINGS = 1.5
NOTHING: Sizes = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """The distance of A from B, and those of A from each further run that has the tensor."""

    difference: Distance | None
    noise: tuple[Distance, ...]


def measure_items(task: Task, items: Sequence[Item]) -> list[Measured]:
    """The distances of each item; nothing of a tensor that cannot be read."""
    return [_measured(task, *item) for item in items]


def _measured(task: Task, pair: Pair, pieces: Pieces, others: Sequence[Counterpart]) -> Measured:
    difference = _distance(task, 1, pair, pieces)
    found = (_distance(task, 2 + each.run, each.pair, each.pieces) for each in others)
    return Measured(difference, tuple(each for each in found if each is not None))


def _distance(task: Task, side: int, pair: Pair, pieces: Pieces) -> Distance | None:
    try:
        with ExitStack() as stack:
            x = Operand(opened(task, 0), pair.a, stack, pieces[0].axis)
            y = Operand(opened(task, side), pair.b, stack, pieces[1].axis)
            return distance(x, y, pieces)
    except ReadError:
        return None


def measured_in(pool: Executor, task: Task, items: Mapping[int, Item]) -> dict[int, Measured]:
    """What the workers measure of each item, by its key."""
    rest = iter(items.items())
    waiting = []
    while batch := list(islice(rest, _BATCH)):
        waiting.append((batch, pool.submit(measure_items, task, [item for _, item in batch])))
    found: dict[int, Measured] = {}
    for batch, future in waiting:
        found.update(zip((key for key, _ in batch), future.result(), strict=True))
    return found


def judged(
    results: Sequence[TensorResult],
    items: Mapping[int, Item],
    measured: Mapping[int, Measured],
    factor: float,
    exact: bool,
    asked: bool,
) -> Iterator[TensorResult]:
    """The results anew: those with noise are different where they are beyond ``factor`` times it.

    What is within a tolerance that was ``asked`` for, or a rule's, is not. A tensor's noise is that of
    all its rows, whichever requests they belong to. Where it rests on few rows, or none, it is taken for
    no less than what rounding does by chance, and the difference that was taken for noise just before, in
    the call's inputs. Not so where the runs should be ``exact`` and the further runs are, bit by bit, in
    all that differs; where they are and the runs should not, they tell nothing, and the dtype's tolerance
    must be exceeded, too.
    """
    shown = any(each.any for found in measured.values() for each in found.noise)
    noisy = shown or not exact
    levels: dict[tuple[int, str], Level] = {}
    for place, sides in measured.items():
        key = items[place][0].a.step, items[place][0].a.names[0]
        for each in sides.noise:
            levels[key] = levels.get(key, Level()).joined(each)
    before: dict[tuple[object, ...], Sizes] = {}
    for place, result in enumerate(results):
        found = measured.get(place)
        if found is None or found.difference is None or not found.noise:
            yield result
            continue
        pair = items[place][0]
        whose = result.step, result.rank, result.request
        call = (*whose, result.first_position, result.module, result.call)
        inputs = result.direction == "inputs"
        level = levels[pair.a.step, pair.a.names[0]]
        if noisy:
            level = level.raised(found.difference, before.get(whose if inputs else call, NOTHING))
        noise = level.of(found.difference)
        near = result.agrees and (asked or result.rule is not None or not (shown or exact))
        beyond = noise.units > factor and not near
        if not beyond and found.difference.rounding:
            sizes = found.difference.sizes
            if inputs:
                before[call] = _largest(before.get(call, NOTHING), sizes)
            before[whose] = sizes
        status: Status = "different" if beyond else "close"
        yield replace(result, status=status, noise=noise)


@dataclass(frozen=True, slots=True)
class Level:
    """A tensor's noise in all its rows, by each measure; ``norm`` is what was seen by the first of them."""

    sizes: Sizes = NOTHING
    unlike: int = 0
    spread: tuple[float, float] = (0.0, 0.0)
    counted: int = 0
    runs: int = 0
    seen: bool = False
    norm: float = 0.0

    def joined(self, more: Distance) -> Level:
        """With what another run or other rows show."""
        spread = self.spread[0] + more.spread[0], self.spread[1] + more.spread[1]
        sizes, unlike = _largest(self.sizes, more.sizes), max(self.unlike, more.unlike)
        counted = self.counted + max(1, more.count // more.width)
        return Level(sizes, unlike, spread, counted, self.runs + 1, self.seen or more.any, sizes[0])

    @property
    def rows(self) -> float:
        """How many rows there would be, were the noise the same in each."""
        squares, fourth = self.spread
        return squares / fourth * squares if fourth else 0.0

    def raised(self, difference: Distance, before: Sizes) -> Level:
        """The noise that may be there, where what was seen rests on few rows or none."""
        rounding = difference.rounding
        if not rounding:
            return self
        value = _ROUNDINGS * rounding
        if not self.rows:
            return replace(self, sizes=_largest((rounding / 2, rounding / 2, value), before))
        norm = rounding * math.sqrt(_CHANCE / max(difference.count, _CHANCE))
        row = rounding * math.sqrt(_CHANCE / max(difference.width, _CHANCE))
        usual = math.sqrt(self.spread[0] / self.counted) * _doubt(self.rows)
        return replace(self, sizes=_largest(self.sizes, (max(norm, usual), max(row, usual), value)))

    def of(self, difference: Distance) -> Noise:
        """A difference in units of this noise.

        Where it is larger than what was seen in all rows, its extremes are so by chance, too.
        """
        if difference.unlike > self.unlike:
            units = _units(difference.unlike, self.unlike)
            return Noise(units, "special", difference.unlike, self.unlike, self.seen, self.runs)
        row, value = self._scatter(difference)
        levels = self.sizes[0], self.sizes[1] * row, self.sizes[2] * value
        each = [_units(size, level) for size, level in zip(difference.sizes, levels, strict=True)]
        at = each.index(max(each))
        name = cast(By, get_args(By)[at])
        return Noise(each[at], name, difference.sizes[at], levels[at], self.seen, self.runs)

    def _scatter(self, difference: Distance) -> tuple[float, float]:
        """How much larger the worst row and value may be: the root of how much larger the rest is.

        The rest is all other rows for a row, and everything for a value.
        """
        usual = self.spread[0] / self.counted if self.counted else 0.0
        rows = max(1, difference.count // difference.width)
        rest = max(0.0, difference.spread[0] - difference.row**2) / max(1, rows - 1)
        squares = rest / usual if usual else 1.0, (difference.norm / self.norm) ** 2 if self.norm else 1.0
        row, value = (max(1.0, each) ** 0.25 if math.isfinite(each) else 1.0 for each in squares)
        return row, value


def _doubt(rows: float) -> float:
    """By how much a standard deviation may exceed what so many values show: once in a hundred times.

    Wilson's and Hilferty's approximation of the chi-squared distribution.
    """
    part = 2 / (9 * rows)
    return 1 / math.sqrt(max((1 - part - _RARE * math.sqrt(part)) ** 3, _LEAST))


def _largest(one: Sizes, other: Sizes) -> Sizes:
    return cast(Sizes, tuple(map(max, one, other)))


def _units(size: float, level: float) -> float:
    if math.isnan(size) or math.isinf(size):
        return math.inf
    if not size:
        return 0.0
    return size / level if level else math.inf
