"""Which tensor of one run belongs to which of the other, in order of execution."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import ConfigError
from ...layout.names import PathKey
from ...reader import Run, Step
from ...record import Json
from ..results import TensorResult

Rename = tuple[re.Pattern[str], str]
Key = tuple[int, str, int, str, tuple[PathKey, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor that belong to one request, or a whole tensor (``request`` is None)."""

    request: str | None
    rows: tuple[int, int] | None
    first_position: int | None


WHOLE = Piece(None, None, None)


@dataclass(frozen=True, slots=True)
class Source:
    """Where one side of a pair lies: a step and one tensor in it, or two tensors to be added.

    With ``unshard`` each name stands for the tensor that the ranks' parts make up.
    """

    step: int
    names: tuple[str, ...]
    records: tuple[Json, ...]
    unshard: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors to be compared, whole or piece by piece (of A, of B)."""

    key: Key
    a: Source
    b: Source
    pieces: tuple[tuple[Piece, Piece], ...] = ((WHOLE, WHOLE),)


@dataclass(frozen=True, slots=True)
class Matching:
    """All pairs in order of execution in run A, and what cannot be paired.

    ``left_out`` are tensors that exist and are no result: neither run stored them, or only one has them
    and that is to be ignored.
    """

    pairs: Sequence[Pair]
    missing: Sequence[TensorResult]
    notes: Sequence[str]
    left_out: Sequence[TensorResult] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """What to pair and how: ``maps`` rename A's modules to B's, ``sums`` are output positions to add.

    ``steps`` and ``modules`` limit the comparison (None: all); ``requests`` maps A's request ids to B's.
    ``unshard`` compares the model's tensors, whichever ranks hold them, instead of each rank's own.
    """

    maps: tuple[Rename, ...] = ()
    sums: tuple[int, ...] = ()
    steps: frozenset[int] | None = None
    modules: tuple[re.Pattern[str], ...] = ()
    requests: tuple[tuple[str, str], ...] = ()
    ignore_missing: bool = False
    unshard: bool = False

    @property
    def bridges(self) -> bool:
        """Whether two implementations are compared, whose calls take and return different structures."""
        return bool(self.maps or self.sums)


def renames(texts: str | Iterable[str]) -> tuple[Rename, ...]:
    """``REGEX=REPLACEMENT`` texts, or a single one, as patterns. Raises ConfigError for one that is none."""
    found: list[Rename] = []
    for text in [texts] if isinstance(texts, str) else texts:
        pattern, equals, replacement = text.rpartition("=")
        if not equals:
            raise ConfigError("--map", f"{text!r} is not REGEX=REPLACEMENT")
        compiled = compiled_pattern(pattern, "--map")
        try:
            compiled.sub(replacement, "")
            re.compile(f"{pattern}|").sub(replacement, "")
        except (re.error, IndexError) as error:
            raise ConfigError(
                "--map", f"{replacement!r} is not a replacement for {pattern!r}: {error}"
            ) from error
        found.append((compiled, replacement))
    return tuple(found)


def positions(sums: Iterable[int]) -> tuple[int, ...]:
    """Output positions to be added. Raises ConfigError for a text, whose characters are none."""
    if isinstance(sums, str):
        raise ConfigError("sums", f"{sums!r} is not a sequence of output positions, such as (0, 1)")
    return tuple(sums)


def compiled_patterns(texts: str | Iterable[str], where: str) -> tuple[re.Pattern[str], ...]:
    """Regular expressions; a single text is one, as in the configuration. Raises ConfigError."""
    return tuple(compiled_pattern(text, where) for text in ([texts] if isinstance(texts, str) else texts))


def compiled_pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression. Raises ConfigError, naming ``where`` it was given, when it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(where, f"{text!r} is not a regular expression: {error}") from error


def match(a: Run, b: Run, rules: Rules) -> Matching:
    """Pair the tensors of two runs: per request where both have request rows, else per step."""
    # Imported here, since they build on this module.
    from .requests import match_requests
    from .scalars import differing_values
    from .unstored import one_sided

    rules = replace(rules, unshard=_layout(a) != _layout(b))
    missing = [*_unusable(a, 0, rules), *_unusable(b, 1, rules)]
    steps_a, steps_b = _steps(a, rules), _steps(b, rules)
    per_request = any(step.rows for step in steps_a) and any(step.rows for step in steps_b)
    pairs, absent, notes = (match_requests if per_request else _match_steps)(steps_a, steps_b, rules)
    lacking, left_out, more_notes = one_sided(steps_a, steps_b, rules)
    absent += lacking
    if not per_request:
        notes += differing_values(steps_a, steps_b, rules)
    notes += [*more_notes, *_not_stored("A", steps_a), *_not_stored("B", steps_b)]
    if rules.ignore_missing:
        if absent:
            notes.append(f"{len(absent)} tensors that only one run has were left out")
        left_out += absent
        absent = []
    if a.state != "complete" or b.state != "complete":
        states = f"A is {a.state}, B is {b.state}"
        notes.append(f"not every run was closed ({states}); only what was committed can be compared")
    return Matching(pairs, [*missing, *absent], notes, left_out)


def _layout(run: Run) -> tuple[int, ...]:
    """How a run's ranks share the model: runs of one layout are compared rank by rank."""
    place = run.ranks.get(0, {})
    return (run.world_size, *(int(place.get(f"{group}_size", 1)) for group in ("tp", "pcp", "pp")))


def _steps(run: Run, rules: Rules) -> list[Step]:
    return [run.step(number) for number in run.steps if rules.steps is None or number in rules.steps]


def _unusable(run: Run, side: int, rules: Rules) -> Iterator[TensorResult]:
    """A missing result for each step that was asked for, or begun, and is not whole."""
    label = "AB"[side]
    for number in run.incomplete_steps:
        if rules.steps is None or number in rules.steps:
            yield _missing_step(number, f"step {number} of {label} was not committed by every rank")
    for number in sorted((rules.steps or frozenset()) - {*run.steps, *run.incomplete_steps}):
        yield _missing_step(number, f"{label} has no step {number}")


def _missing_step(step: int, reason: str) -> TensorResult:
    return TensorResult("missing", step, 0, "", 0, "outputs", (), (None, None), reason=reason)


def _not_stored(label: str, steps: Sequence[Step]) -> list[str]:
    notes = []
    for column in ("skipped", "dropped", "failed"):
        count = sum(getattr(step.ledger, column) for step in steps)
        if count:
            notes.append(f"{count} tensors of {label} were {column} at capture: they cannot be compared")
    return notes


def keyed(step: Step, rules: Rules, rename: bool) -> dict[Key, Source]:
    """A step's tensors by what they are, in order of execution (ranks side by side).

    Records stand in ``step.json`` in the order in which they came about: inputs at entry, outputs at
    return, so a child's output before its parent's.
    """
    calls = renamed(rules, rename)
    found: dict[Key, Source] = {}
    for rank, record in _ordered(step, rules.unshard):
        module, call = calls.of(rank, str(record["module"]), int(record["call"]))
        if rules.modules and not any(pattern.search(module) for pattern in rules.modules):
            continue
        key = (rank, module, call, str(record["direction"]), tuple(record["path"]))
        found[key] = Source(step.number, (str(record["name"]),), (record,), rules.unshard)
    return found


def _ordered(step: Step, unshard: bool) -> Iterator[tuple[int, Json]]:
    """A step's records with their rank, or with the replica that they belong to."""
    if unshard:
        yield from ((step.replica(record["rank"]), record) for record in step.wholes)
        return
    place: dict[int, int] = defaultdict(int)
    ordered: list[tuple[int, int, Json]] = []
    for record in step.records:
        rank = int(record["rank"])
        ordered.append((place[rank], rank, record))
        place[rank] += 1
    yield from (entry[1:] for entry in sorted(ordered, key=lambda entry: entry[:2]))


def renamed(rules: Rules, rename: bool) -> Calls:
    """The names that a step's modules go by, with A's (``rename``) turned into B's."""
    return Calls(rules.maps if rename else ())


class Calls:
    """Renames modules; calls of several modules that get one name are numbered in call order."""

    def __init__(self, maps: Sequence[Rename]) -> None:
        self._maps = maps
        self._seen: dict[tuple[int, str], dict[tuple[str, int], int]] = defaultdict(dict)

    def of(self, rank: int, module: str, call: int) -> tuple[str, int]:
        """The module and call that one counts as."""
        name = module
        for pattern, replacement in self._maps:
            name = pattern.sub(replacement, name)
        calls = self._seen[rank, name]
        if all(other == module for other, _ in calls):
            return name, calls.setdefault((module, call), call)
        return name, calls.setdefault((module, call), max(calls.values()) + 1)


def _match_steps(
    steps_a: Sequence[Step], steps_b: Sequence[Step], rules: Rules
) -> tuple[list[Pair], list[TensorResult], list[str]]:
    pairs: list[Pair] = []
    missing: list[TensorResult] = []
    by_number: Mapping[int, Step] = {step.number: step for step in steps_b}
    for step in steps_a:
        mine = keyed(step, rules, rename=True)
        theirs = keyed(by_number[step.number], rules, rename=False) if step.number in by_number else {}
        mine, theirs = bridged(mine, theirs, rules)
        for key, source in mine.items():
            if key in theirs:
                pairs.append(Pair(key, source, theirs[key]))
            else:
                missing.append(absent(key, source, 0))
        missing += [absent(key, source, 1) for key, source in theirs.items() if key not in mine]
    numbers = {step.number for step in steps_a}
    for step in steps_b:
        if step.number not in numbers:
            missing += [absent(key, source, 1) for key, source in keyed(step, rules, rename=False).items()]
    return pairs, missing, []


def bridged(
    mine: dict[Key, Source], theirs: dict[Key, Source], rules: Rules
) -> tuple[dict[Key, Source], dict[Key, Source]]:
    """Both sides' tensors with split ones added and differing paths made equal, if the rules ask for it."""
    if not rules.bridges:
        return mine, theirs
    from .bridge import bridge

    plan_a, plan_b = bridge(mine, theirs, rules.sums)
    return plan_a.apply(mine), plan_b.apply(theirs)


def absent(key: Key, source: Source, side: int, request: str | None = None) -> TensorResult:
    """The result for a tensor that only one side (0: A, 1: B) has."""
    rank, module, call, _, path = key
    name = source.names[0]
    record = source.records[0]
    return TensorResult(
        status="missing",
        step=source.step,
        rank=rank,
        module=module,
        call=call,
        direction=record["direction"],
        path=path,
        names=(None, name) if side else (name, None),
        reason=f"only {'AB'[side]} has it",
        request=request,
    )
