"""What a comparison found: one result a tensor, and the verdict over all of them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..layout.directions import is_operator
from ..layout.names import PathKey, shown_module
from ..reader import Run, Step
from ..record import Direction, Json
from .culprit import Culprit, Look, culprit
from .details import Details
from .frames import data_frame
from .measure import Measures
from .operators import Used, advice, other_code_in, used_for
from .origin import Birth, Entered, Seen, birth, entered_in


class Gap(str):
    """A note on what was not compared: it stands beside the verdict."""

    __slots__ = ()


Status = Literal["bitwise", "close", "different", "missing", "unreadable"]
_DIFFER = frozenset({"different", "missing", "unreadable"})


@dataclass(frozen=True, slots=True)
class Noise:
    """How a tensor's difference stands to its noise: what further runs of A differ from A by.

    ``units`` is how many times the noise the difference is, by the ``measure`` in which it is most: relative
    to the tensor's ``norm``, to that of the worst ``row``, in one ``value`` relative to the largest, or
    ``special``, the number of values that are NaN or infinite in one run alone. Of whole numbers they are
    fractions that differ. ``difference`` and ``noise`` are those two sizes, ``seen`` is whether the further
    runs show any, of which the tensors (or parts of one) of ``runs`` were measured: else it is what rounding
    does by chance. Infinite where there is a difference and no noise.
    """

    units: float
    measure: Literal["norm", "row", "value", "special"]
    difference: float
    noise: float
    seen: bool
    runs: int

    def __str__(self) -> str:
        what = {"norm": "norm", "row": "worst row", "value": "largest value", "special": "NaN and Inf"}
        sizes = f"{what[self.measure]}: {self.difference:.3g} against {self.noise:.3g}"
        if not self.noise:
            return f"where there is no noise ({sizes})"
        return f"{self.units:.3g} times the noise ({sizes})"


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor of one run against its counterpart; of vLLM runs, the rows of one request.

    ``step`` and ``module`` are those of run A where it has the tensor, else those of B. ``reason`` says
    in words what is wrong, ``first_position`` is the token position of the first row compared. With
    ``noise`` that decides whether the tensor is different. ``rule`` is the pattern of the rule that
    it was held against. The first tensors that are different have ``details``.
    """

    status: Status
    step: int
    rank: int
    module: str
    call: int
    direction: Direction
    path: tuple[PathKey, ...]
    names: tuple[str | None, str | None]
    dtypes: tuple[str | None, str | None] = (None, None)
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    measures: Measures | None = None
    reason: str | None = None
    request: str | None = None
    first_position: int | None = None
    noise: Noise | None = None
    rule: str | None = None
    details: Details | None = None

    @property
    def agrees(self) -> bool:
        """Whether both runs have the tensor and its values agree within the tolerance."""
        return self.status not in _DIFFER

    def to_json(self) -> Json:
        """A JSON object; numbers that JSON lacks become text."""
        document = asdict(self)
        for part in ("measures", "noise", "details"):
            if document[part] is not None:
                document[part] = {key: _number(value) for key, value in document[part].items()}
        return document


def _number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_number(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two runs part: the first tensor, in order of execution, whose values differ.

    ``born`` is True where the call's inputs agree and its outputs do not, False where an input already
    differs (the cause lies outside the captured modules), and None where that is not known.

    ``within`` is for an input that is the first tensor to differ: the module, and which call of it, in whose
    own code it was born, between its captured submodules. It is ``""`` for the model; where its inputs were
    not captured, the fault may come from outside (``born`` is None). ``operator`` is for the result of one:
    which, and where it is called; ``born`` then speaks of its inputs.
    """

    step: int
    module: str
    call: int
    direction: Direction
    born: bool | None
    result: TensorResult
    within: str | None = None
    within_call: int = 0
    operator: Used | None = None

    def to_json(self) -> Json:
        """The divergence as a JSON object."""
        found: Json = {
            "step": self.step,
            "module": self.module,
            "call": self.call,
            "direction": self.direction,
            "born": self.born,
            "within": self.within,
            "within_call": self.within_call,
        }
        if self.operator is not None:
            found["operator"] = self.operator.to_json()
        if self.result.request is not None:
            found |= {"request": self.result.request, "first_position": self.result.first_position}
        if self.result.noise is not None:
            found["noise"] = self.result.to_json()["noise"]
        return found

    def __str__(self) -> str:
        call = f" (call {self.call})" if self.call else ""
        request = f", request {self.result.request}" if self.result.request is not None else ""
        if self.operator is not None:
            how = str(self.operator)
        elif self.direction == "inputs" and self.born is not False:
            how = Birth(self.born, self.within, self.within_call).between("agree")
        elif self.direction == "inputs":
            how = "passed on: it comes in from outside"
        else:
            how = {
                True: "born here: its inputs agree",
                False: "passed on: an input already differs",
                None: "its inputs were not compared",
            }[self.born]
        size = "" if self.result.noise is None else f"; {self.result.noise}"
        return (
            f"{shown_module(self.module)}{call}, {self.direction} of step {self.step}{request}; {how}{size}"
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """The opened runs, the pair of tensors behind each of the first results, and what is no result."""

    runs: tuple[Run, Run]
    pairs: Sequence[tuple[Any, Any]]
    steps: Sequence[Step]
    left_out: Sequence[TensorResult] = ()


def look_at(result: TensorResult, side: int) -> Look:
    """What one run's tensor holds, where it was measured: what is equal bit by bit is not."""
    known = result.status not in ("missing", "unreadable")
    measures = result.measures
    return Look(
        step=result.step,
        rank=result.rank,
        call=(result.step, result.request, result.first_position, result.module, result.call),
        module=result.module,
        number=result.call,
        direction=result.direction,
        nans=(measures.nans[side] if measures is not None else 0) if known else None,
        infs=(measures.infs[side] if measures is not None else 0) if known else None,
    )


Call = tuple[str, int]


def _born_in(direction: str, call: Call, within: tuple[str | None, int]) -> Call | None:
    """The call in whose code a divergence is born: of inputs the one around it; None where none is known."""
    if direction != "inputs":
        return call
    module, number = within
    return None if module is None else (module, number)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `tlcore.compare`: every tensor in order of execution, then what only one run has.

    ``notes`` are facts to know that are no difference, such as tensors that both runs skipped. ``noise``
    names the further runs of A that differences were held against, and the factor.
    """

    a: str
    b: str
    results: Sequence[TensorResult]
    notes: Sequence[str] = ()
    noise: Json | None = None
    origin: Origin | None = field(default=None, repr=False, compare=False)

    @property
    def equal(self) -> bool:
        """Whether every tensor is in both runs and agrees within the tolerance."""
        return all(result.agrees for result in self.results)

    @property
    def not_compared(self) -> list[str]:
        """The notes on what the verdict does not cover."""
        return [note for note in self.notes if isinstance(note, Gap)]

    @property
    def first_divergence(self) -> Divergence | None:
        """The first tensor in order of execution whose values or shapes differ beyond the tolerance."""
        return self._first({"different"})

    @property
    def first_difference(self) -> Divergence | None:
        """The first tensor in order of execution that differs in any bit or in dtype."""
        return self._first({"close", "different"})

    @property
    def culprits(self) -> list[tuple[Literal["A", "B"], Culprit]]:
        """The call that NaN or infinities come from, of each run that holds some where the other differs.

        What is the same in both runs, such as a mask, counts as finite.
        """
        found: list[tuple[Literal["A", "B"], Culprit]] = []
        for side, label in enumerate(get_args(Literal["A", "B"])):
            of_side = culprit(look_at(each, side) for each in self.results)
            if of_side is not None:
                found.append((label, of_side))
        return found

    @property
    def counts(self) -> dict[Status, int]:
        """How many results there are of each status."""
        found: dict[Status, int] = dict.fromkeys(get_args(Status), 0)
        for result in self.results:
            found[result.status] += 1
        return found

    @property
    def advice(self) -> str | None:
        """How to see more of the first divergence than its module; None where there is no more."""
        found = self.first_divergence
        if found is None or not found.born or found.operator is not None:
            return None
        where = _born_in(found.direction, (found.module, found.call), (found.within, found.within_call))
        if where is None:
            return None
        module, call = where
        known = ((each.step, each.module, each.call) for each in self.results if is_operator(each.direction))
        return None if (found.step, module, call) in known else advice(module)

    def _first(self, statuses: set[str]) -> Divergence | None:
        for place, result in enumerate(self.results):
            if result.status in statuses:
                left_out = result.direction == "inputs"
                seen = self._seen(statuses, left_out)
                found = birth(seen, place, self._entered())
                used = None if self.origin is None else self._used(seen[place], found, statuses)
                return Divergence(
                    result.step,
                    result.module,
                    result.call,
                    result.direction,
                    found.born if used is None else used.born,
                    result,
                    found.within,
                    found.within_call,
                    used,
                )
        return None

    def _used(self, result: Seen, found: Birth, statuses: set[str]) -> Used | None:
        """What gave the first tensor to differ, or what other code there is where it was born."""
        assert self.origin is not None
        seen = self._seen(statuses, left_out=True)
        used = used_for(result, self.origin.runs, seen)
        if used is not None or not found.born:
            return used
        where = _born_in(result.direction, (result.module, result.call), (found.within, found.within_call))
        if where is None:
            return None
        return other_code_in((result.step, result.rank, *where), self.origin.runs, seen)

    def _seen(self, statuses: set[str], left_out: bool) -> list[Seen]:
        """All tensors, perhaps with those that were left out, by whether they have one of the statuses."""
        more = self.origin.left_out if left_out and self.origin is not None else ()
        return [
            Seen(
                step=each.step,
                rank=each.rank,
                request=each.request,
                module=each.module,
                call=each.call,
                direction=each.direction,
                path=each.path,
                names=each.names,
                bad=None if each.status in ("missing", "unreadable") else each.status in statuses,
                placed=each.status != "missing",
            )
            for each in (*self.results, *more)
        ]

    def _entered(self) -> Entered:
        return (lambda *_: ()) if self.origin is None else entered_in(*self.origin.runs)

    def to_json(self) -> Json:
        """The whole comparison as a JSON object."""
        first = self.first_divergence
        difference = self.first_difference
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "first_divergence": first.to_json() if first else None,
            "first_difference": difference.to_json() if difference else None,
            "culprits": {label: found.to_json() for label, found in self.culprits},
            "advice": self.advice,
            "counts": self.counts,
            "noise": self.noise,
            "notes": list(self.notes),
            "not_compared": self.not_compared,
            "results": [result.to_json() for result in self.results],
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row a tensor. Raises ImportError without pandas."""
        return data_frame((result.to_json() for result in self.results), "measures")

    def __str__(self) -> str:
        counted = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        first = self.first_divergence
        verdict = "equal" if self.equal else f"first divergence: {first}" if first else "tensors are missing"
        return f"{verdict}\n{counted}"

    def _repr_html_(self) -> str:
        worst = [result for result in self.results if not result.agrees][:20]
        rows = "".join(
            f"<tr><td>{html.escape(shown_module(result.module))}</td><td>{result.direction}</td><td>{result.status}</td>"
            f"<td>{'' if result.measures is None else f'{result.measures.max_abs:.3g}'}</td></tr>"
            for result in worst
        )
        head = "<tr><th>module</th><th>direction</th><th>status</th><th>max abs</th></tr>"
        table = f"<table>{head}{rows}</table>" if rows else ""
        return f"<p>{'<br>'.join(html.escape(str(self)).splitlines())}</p>{table}"
