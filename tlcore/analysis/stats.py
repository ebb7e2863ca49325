"""`stats`: the statistics of every tensor of a run, and where the first NaN and infinity appear."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from html import escape
from math import prod
from typing import Any

from ..errors import ReadError
from ..layout.names import PathKey, shown_module
from ..ledger import Counts
from ..locations import is_url
from ..reader import Run, Step, open_run
from ..reader.lasting import lasting_objects
from ..record import Direction, Json
from ..statistics.stored import Statistics
from .culprit import Culprit, Look, culprit, may_be_mask
from .frames import data_frame
from .groups import Group
from .matching.keyed import keyed
from .matching.rules import Rules, compiled_patterns
from .matching.unstored import skipped
from .origin import Birth, Seen, birth, entered_in

RunLike = Run | str | os.PathLike[str]
_REMOTE_WORKERS = 8
_AHEAD = 1024
# What one thread takes at a time: of many steps in one piece, of local files, of remote ones.
_TOGETHER = (8192, 16, 1)


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """One tensor and its statistics; ``problem`` says why it has none."""

    step: int
    rank: int
    module: str
    call: int
    direction: Direction
    path: tuple[PathKey, ...]
    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Statistics | None
    problem: str | None = None

    def to_json(self) -> Json:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where something was first seen: the tensor, how many of its values, and whether it was born there.

    ``born`` is True where the call's inputs are free of it, None where that is not known. ``within`` is for
    an input: the module in whose own code it was born, as in `Divergence`.
    """

    what: str
    tensor: TensorStatistics
    count: int
    born: bool | None
    within: str | None = None
    within_call: int = 0

    def __str__(self) -> str:
        tensor = self.tensor
        call = f" (call {tensor.call})" if tensor.call else ""
        if tensor.direction == "inputs" and self.born is not False:
            how = Birth(self.born, self.within, self.within_call).between("are free of it")
        else:
            how = {
                True: "born here: its inputs are free of it",
                False: "passed on: it comes in from outside",
                None: "its inputs were not stored",
            }[self.born]
        counted = f"{self.count} of {prod(tensor.shape)} values"
        return (
            f"{self.what} first seen in {shown_module(tensor.module)}{call}, {tensor.direction}"
            f" of step {tensor.step} ({counted}); {how}"
        )

    def to_json(self) -> Json:
        """A JSON object."""
        place = {key: getattr(self.tensor, key) for key in ("step", "module", "call", "direction", "name")}
        birth = {"born": self.born, "within": self.within, "within_call": self.within_call}
        return {**place, "count": self.count, **birth}


@dataclass(frozen=True, slots=True)
class Survey:
    """The statistics of a run's tensors, in order of execution."""

    run: str
    tensors: Sequence[TensorStatistics]
    notes: Sequence[str] = ()
    origin: Run | None = field(default=None, repr=False, compare=False)

    @property
    def culprit(self) -> Culprit | None:
        """The first call whose inputs are finite and whose result holds a NaN or an infinity.

        An argument that is a mask, with -inf where nothing is to be seen, counts as finite.
        """
        return culprit(self.looks())

    def looks(self) -> list[Look]:
        """Each tensor as to whether it holds NaN or infinities, and whether those are harmless."""
        return [
            Look(
                step=each.step,
                rank=each.rank,
                call=(each.step, each.module, each.call),
                module=each.module,
                number=each.call,
                direction=each.direction,
                nans=None if each.values is None else each.values.nans,
                infs=None if each.values is None else each.values.infs,
                harmless=self._is_mask(each),
            )
            for each in self.tensors
        ]

    def _is_mask(self, tensor: TensorStatistics) -> bool:
        """Whether an argument holds -inf on purpose: no call returned it, and nothing else in it is odd."""
        if tensor.direction == "outputs" or tensor.values is None:
            return False
        if not may_be_mask(tensor.path, tensor.values):
            return False
        content = self._content(tensor)
        returned = (each for each in self.tensors if each.direction == "outputs" and each.step == tensor.step)
        spoiled = (each for each in returned if each.values is not None and each.values.nonfinite)
        if content is not None and any(self._content(each) == content for each in spoiled):
            return False
        return not self._holds_plus_infinity(tensor)

    def _content(self, tensor: TensorStatistics) -> str | None:
        if self.origin is None:
            return None
        step = self.origin.step(tensor.step)
        if step.has_record(tensor.name):
            return str(step.record(tensor.name).get("hash") or "") or None
        return None if tensor.values is None else tensor.values.hash

    def _holds_plus_infinity(self, tensor: TensorStatistics) -> bool:
        step = None if self.origin is None else self.origin.step(tensor.step)
        if step is None or not step.has_record(tensor.name):
            # Statistics do not tell the sign.
            return False
        try:
            return bool(step.tensor(tensor.name).isposinf().any())
        except (ReadError, RuntimeError):
            return True

    @property
    def first_nan(self) -> Sighting | None:
        """The first tensor, in order of execution, that holds a NaN."""
        return self._first("NaN", lambda values: values.nans)

    @property
    def first_inf(self) -> Sighting | None:
        """The first tensor, in order of execution, that holds an infinity and is no mask."""
        return self._first("Inf", lambda values: values.infs)

    @property
    def unreadable(self) -> list[TensorStatistics]:
        """The tensors that could not be read."""
        return [tensor for tensor in self.tensors if tensor.problem is not None]

    def verdict(self) -> list[str]:
        """The lines that stand above the table."""
        found = [str(each) for each in (self.culprit, self.first_nan, self.first_inf) if each]
        bad = len(self.unreadable)
        lines = found or ["no NaN and no Inf" + (" in what could be read" if bad else "")]
        if bad:
            lines.insert(0, f"{bad} tensors cannot be read")
        return [*lines, f"tensors: {len(self.tensors)}", *(f"note: {note}" for note in self.notes)]

    def to_json(self) -> Json:
        """The whole survey as a JSON object."""
        nan, inf = self.first_nan, self.first_inf
        return {
            "run": self.run,
            "culprit": None if (found := self.culprit) is None else found.to_json(),
            "first_nan": nan.to_json() if nan else None,
            "first_inf": inf.to_json() if inf else None,
            "notes": list(self.notes),
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row a tensor. Raises ImportError without pandas."""
        return data_frame((tensor.to_json() for tensor in self.tensors), "values")

    def __str__(self) -> str:
        return "\n".join(self.verdict())

    def _repr_html_(self) -> str:
        return f"<p>{'<br>'.join(map(escape, self.verdict()))}</p>"

    def _first(self, what: str, count: Callable[[Statistics], int]) -> Sighting | None:
        for place, tensor in enumerate(self.tensors):
            if tensor.values is not None and count(tensor.values) and not self._is_mask(tensor):
                found = self._birth(place, count)
                number = count(tensor.values)
                return Sighting(what, tensor, number, found.born, found.within, found.within_call)
        return None

    def _birth(self, place: int, count: Callable[[Statistics], int]) -> Birth:
        try:
            seen = self._seen(self.tensors[place], count)
        except ReadError:
            return Birth(None)
        return birth(seen, place, (lambda *_: ()) if self.origin is None else entered_in(self.origin))

    def _seen(self, found: TensorStatistics, count: Callable[[Statistics], int]) -> list[Seen]:
        """All tensors by whether they hold what is counted, then those of the step that were not stored."""
        seen = [
            Seen(
                step=each.step,
                rank=each.rank,
                request=None,
                module=each.module,
                call=each.call,
                direction=each.direction,
                path=each.path,
                names=(each.name,),
                bad=None if each.values is None else bool(count(each.values)),
            )
            for each in self.tensors
        ]
        if self.origin is None or found.direction != "inputs":
            return seen
        known = {
            (each.rank, each.module, each.call, each.direction, each.path)
            for each in seen
            if each.step == found.step
        }
        unstored = skipped(self.origin.step(found.step), Rules(), rename=False).keys() - known
        return [*seen, *(Seen(found.step, key[0], None, *key[1:], (None,), None, False) for key in unstored)]


@lasting_objects()
def stats(
    run: RunLike,
    *,
    steps: Iterable[int] | None = None,
    modules: str | Iterable[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """The statistics of every tensor of a run, given as a path, URL or opened run.

    ``steps`` and ``modules`` (regular expressions, or a single one) limit what is read. A tensor that cannot
    be read has a problem in the place of statistics; statistics that were captured are taken as they are.
    Raises ReadError when the run cannot be opened or has no such tensor, ConfigError for a pattern that is
    none.
    """
    opened = run if isinstance(run, Run) else open_run(run, storage_options)
    wanted = None if steps is None else frozenset(steps)
    rules = Rules(steps=wanted, modules=compiled_patterns(modules, "modules"))
    chosen = [opened.step(number) for number in opened.steps if wanted is None or number in wanted]
    measured = opened.config.get("capture", "tensor") != "tensor"
    records = [(step, record) for step in chosen for record in _records(step, rules, measured)]
    if not records:
        held = ", ".join(map(str, opened.steps)) or "none"
        limits = " in the modules asked for" if rules.modules else ""
        why = why_not_stored(chosen)
        raise ReadError(f"{opened.url}: no tensor to look at{limits}; its whole steps are {held}{why}")
    cores = os.cpu_count() or 1
    tensors = []
    with ThreadPoolExecutor(max(cores, _REMOTE_WORKERS) if is_url(opened.url) else cores) as pool:
        for done, found in enumerate(_in_order(pool, opened, records), 1):
            tensors.append(found)
            if progress is not None:
                progress(done, len(records))
    unstored = sum(not record.get("stored", True) for _, record in records)
    return Survey(opened.url, tensors, list(_notes(opened, chosen, wanted, unstored)), opened)


def why_not_stored(steps: Sequence[Step]) -> str:
    """What became of tensors that steps have and do not hold, in words; empty where there are none."""
    total = Counts()
    for step in steps:
        total.add(step.ledger)
    if not total.skipped:
        return ""
    listed = ", ".join(f"{count}: {reason}" for reason, count in total.reasons.most_common(3))
    return f"; {total.skipped} tensors were not stored ({listed})"


def _records(step: Step, rules: Rules, measured: bool) -> list[Json]:
    """The step's tensors, as `Step.described` where they were ``measured`` at capture, else as records."""
    stored = [source.records[0] for source in keyed(step, rules, rename=False).values()]
    if not measured:
        return stored
    described = [entry for entry in step.described if rules.wants(entry["module"], entry["direction"])]
    names = {entry["name"] for entry in described}
    return [*described, *(record for record in stored if record["name"] not in names)]


def _in_order(
    pool: ThreadPoolExecutor, run: Run, records: Sequence[tuple[Step, Json]]
) -> Iterator[TensorStatistics]:
    """The tensors' statistics; identical tensors of a step are read once."""
    waiting: deque[tuple[Step, Json, Group, int]] = deque()
    known: dict[tuple[int, str, str], tuple[Group, int]] = {}
    stored = run.stored
    most = _TOGETHER[0 if stored.has_arrays else 1 if stored.is_local else 2]
    group = Group(run, most)
    for step, record in records:
        name = str(record["name"])
        content = (step.number, str(record.get("hash") or name), str(record["dtype"]))
        place = known.get(content)
        if place is None or not ("stats" in record or step.holds(name)):
            place = known[content] = group, group.add(step, record)
            if group.is_full:
                group.submit(pool)
                group = Group(run, most)
        waiting.append((step, record, *place))
        if len(waiting) > _AHEAD and waiting[0][2] is not group:
            yield _described(*waiting.popleft())
    group.submit(pool)
    while waiting:
        yield _described(*waiting.popleft())


def _described(step: Step, record: Json, group: Group, place: int) -> TensorStatistics:
    values, problem = None, None
    try:
        values = group.found(place)
    except ReadError as error:
        problem = str(error)
    return TensorStatistics(
        step=step.number,
        rank=int(record["rank"]),
        module=str(record["module"]),
        call=int(record["call"]),
        direction=record["direction"],
        path=tuple(record["path"]),
        name=str(record["name"]),
        dtype=str(record["dtype"]),
        shape=tuple(record["shape"]),
        values=values,
        problem=problem,
    )


def _notes(run: Run, steps: Sequence[Step], wanted: frozenset[int] | None, unstored: int) -> Iterator[str]:
    if run.injection is not None:
        yield f"the run was {run.injection}"
    incomplete = [number for number in run.incomplete_steps if wanted is None or number in wanted]
    if incomplete:
        yield f"steps not committed by every rank, and left out: {', '.join(map(str, incomplete))}"
    absent = sorted((wanted or frozenset()) - {*run.steps, *run.incomplete_steps})
    if absent:
        yield f"there is no step {', '.join(map(str, absent))}"
    total = Counts()
    for step in steps:
        total.add(step.ledger)
    for column in ("skipped", "dropped", "failed"):
        count = getattr(total, column)
        count -= unstored if column == "skipped" else 0
        if count > 0:
            yield f"{count} tensors were {column} at capture and are not among these"
