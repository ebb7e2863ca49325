"""Where a fault came about that a tensor is the first to show: in its call, around it, or before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import ReadError
from ..layout.directions import is_gradient
from ..layout.names import PathKey, module_of, shown_module, within
from ..reader import Run

# The call directories of a side's step and rank in order of entry; nothing where they are not known.
Entered = Callable[[int, str, int], Sequence[str]]
Call = tuple[str, int]
Placed = tuple[int, "Seen"]


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor in order of execution; ``bad`` is whether it shows the fault, None where that is not known.

    It has a name for each run that is looked at, None where that run lacks it. ``placed`` is False where
    its place in the order is not known, either.
    """

    step: int
    rank: int
    request: str | None
    module: str
    call: int
    direction: str
    path: tuple[PathKey, ...]
    names: tuple[str | None, ...]
    bad: bool | None
    placed: bool = True


@dataclass(frozen=True, slots=True)
class Birth:
    """Whether a fault was born where it was said to be seen first, or in the code of a module around that.

    ``within`` is that module, whose inputs are free of the fault and whose captured submodules' outputs
    were, until then. It is ``""`` for the model itself; ``born`` is None where its inputs were not captured.
    """

    born: bool | None
    within: str | None = None
    within_call: int = 0

    def between(self, fine: str) -> str:
        """Where a fault of an input came from, in words; ``fine`` says that tensors are free of it."""
        if self.within is not None and self.born:
            call = f" (call {self.within_call})" if self.within_call else ""
            what = f"its inputs and all outputs in it before {fine}"
            return f"born in {shown_module(self.within)}{call}, between its captured submodules: {what}"
        if self.within is not None:
            what = f"all outputs before {fine}"
            return f"born between the model's captured modules, or given to it from outside: {what}"
        return "where it comes from is not known, since not all before it was captured and compared"


def birth(seen: Sequence[Seen], at: int, entered: Entered) -> Birth:
    """Where the fault came about that ``seen[at]`` is the first to show."""
    found = seen[at]
    around = _Around(seen, at)
    if is_gradient(found.direction):
        return _birth_of_gradient(found, around)
    if found.direction != "inputs":
        inputs = [each for each in around.of((found.module, found.call)) if each.direction == "inputs"]
        if not inputs or any(each.bad is None for each in inputs):
            return Birth(None)
        return Birth(not any(each.bad for each in inputs))
    if _also_elsewhere(seen, found):
        return Birth(None)
    for call, entry in around.enclosing():
        if around.takes_only_good(call):
            known = around.only_good_between(entry, entered)
            return Birth(True, *call) if known else Birth(None)
    if around.first:
        return Birth(False)
    known = around.any_output_before and around.only_good_between(None, entered)
    return Birth(None, "" if known else None)


def _birth_of_gradient(found: Seen, around: _Around) -> Birth:
    """Backward goes from a call's result to its arguments; what is before a result is not seen."""
    source = found.direction.replace("grad_inputs", "grad_outputs")
    given = [each.bad for each in around.of((found.module, found.call)) if each.direction == source]
    if source == found.direction or not given or None in given:
        return Birth(None)
    return Birth(not any(given))


def entered_in(*runs: Run) -> Entered:
    """The order of entry in these runs, one a side."""

    def entered(side: int, step: str, rank: int) -> Sequence[str]:
        try:
            document = runs[side].step(int(step.rpartition("_")[2])).documents.get(rank)
        except (ReadError, ValueError):
            return ()
        return () if document is None else [str(call) for call in document["calls"]]

    return entered


def _also_elsewhere(seen: Sequence[Seen], found: Seen) -> bool:
    """Whether another rank shows the fault where this one does not, so that it may come from there."""
    shown = {
        (each.rank, each.request, each.module, each.call, each.direction, each.path)
        for each in seen
        if each.bad and each.step == found.step
    }
    return any(rank != found.rank and (found.rank, *place) not in shown for rank, *place in shown)


class _Around:
    """The tensors of the step, rank and request of the one that was found, with their places."""

    def __init__(self, seen: Sequence[Seen], at: int) -> None:
        self._at, self._found = at, seen[at]
        self._near: list[Placed] = []
        self._by_call: dict[Call, list[Placed]] = defaultdict(list)
        self._by_directory: dict[tuple[int, tuple[str, str]], list[Placed]] = defaultdict(list)
        for place, each in enumerate(seen):
            if each.rank != self._found.rank:
                continue
            # What is of no request is computed from those of all.
            if self._found.request is not None and each.request not in (None, self._found.request):
                continue
            # Requests are computed in other steps of B, so that a name tells more than the step.
            for side, name in enumerate(each.names):
                self._by_directory[side, _place(name)].append((place, each))
            if each.step == self._found.step:
                self._near.append((place, each))
                self._by_call[each.module, each.call].append((place, each))

    def of(self, call: Call) -> list[Seen]:
        """The tensors of a call."""
        return [each for _, each in self._by_call[call]]

    def enclosing(self) -> Iterator[tuple[Call, Seen]]:
        """The calls that had begun and not ended, with an input of each; the innermost first."""
        begun: dict[Call, tuple[int, Seen]] = {}
        lasting: list[tuple[int, int, Call]] = []
        for place, each in self._near:
            call = (each.module, each.call)
            if not each.placed or not within(self._found.module, each.module):
                continue
            if each.direction == "inputs" and place < self._at:
                begun.setdefault(call, (place, each))
            elif _is_result(each) and place > self._at and call in begun:
                lasting.append((len(each.module), begun[call][0], call))
        for _, _, call in sorted(set(lasting), reverse=True):
            yield call, begun[call][1]

    def takes_only_good(self, call: Call) -> bool:
        """Whether all inputs of a call are known to be free of the fault; it has some."""
        inputs = [each.bad for each in self.of(call) if each.direction == "inputs"]
        return bool(inputs) and all(bad is False for bad in inputs)

    @property
    def first(self) -> bool:
        """Whether no other call is known that came before or may be around this one."""
        own = (self._found.module, self._found.call)
        return not any(
            (place < self._at and (each.module, each.call) != own) or within(self._found.module, each.module)
            for place, each in self._near
        )

    @property
    def any_output_before(self) -> bool:
        """Whether any output was seen before."""
        return any(place < self._at and _is_result(each) for place, each in self._near)

    def only_good_between(self, entry: Seen | None, entered: Entered) -> bool:
        """Whether all calls since ``entry`` (None: since the step began) gave outputs free of the fault.

        Calls that have not ended are left out. What was not stored or not compared is not known.
        """
        for side, name in enumerate(self._found.names):
            step, directory = _place(name)
            order = list(entered(side, step, self._found.rank))
            begin = None if entry is None else _place(entry.names[side])[1]
            if directory not in order or (begin is not None and begin not in order):
                return False
            between = order[0 if begin is None else order.index(begin) + 1 : order.index(directory)]
            if not all(self._gave_only_good(side, step, each, directory) for each in between):
                return False
        return True

    def _gave_only_good(self, side: int, step: str, directory: str, until: str) -> bool:
        own = list(self._by_directory[side, (step, directory)])
        for call in {(each.module, each.call) for _, each in own}:
            own += self._by_call[call]
        outputs = [(place, each) for place, each in own if _is_result(each)]
        if outputs and all(each.bad is False for _, each in outputs):
            # It may come later in A, whose code is another.
            return True
        if not any(each.placed and place < self._at for place, each in outputs):
            # Without outputs before, it may only be a call that has not ended.
            module = own[0][1].module if own else module_of(directory)
            around = self._found.module if own else module_of(until)
            return within(around, module)
        return False


def _is_result(each: Seen) -> bool:
    return each.direction != "inputs" and not is_gradient(each.direction)


def _place(name: str | None) -> tuple[str, str]:
    """The step's and the call's directory in a logical name."""
    parts = (name or "").split("/")
    return (parts[0], parts[1]) if len(parts) > 2 else ("", "")
