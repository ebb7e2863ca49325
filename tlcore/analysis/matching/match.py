"""Which tensor of one run belongs to which of the other, in order of execution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ...layout.row_scale import as_stored
from ...layout.windows import row_choices
from ...ledger import Counts
from ...reader import Run, Step
from ..results import Gap, TensorResult
from .bridge import bridged
from .conventions import naming
from .counting import counted_alike
from .keyed import keyed
from .pairs import Key, Located, Matching, Pair, absent, key_name
from .ranks import spread, spread_note, told_once, with_shards_joined
from .ranks_of_both import held_by_ranks
from .requests import match_requests
from .rules import Rules
from .scalars import differing_values
from .unstored import one_sided

# Patterns that every module fits.
_ALL = (".", ".*", "")
_STEPS_LOOKED_AT = 3


def match(a: Run, b: Run, rules: Rules) -> Matching:
    """Pair the tensors of two runs: per request where both have request rows, else per step."""
    steps_a, steps_b = _steps(a, rules), _steps(b, rules)
    found = None if rules.maps else naming(_modules(steps_a), _modules(steps_b))
    rules = _between_tools(a, b, replace(rules, unshard=_layout(a) != _layout(b)))
    rules = spread(rules, (a, b), (steps_a, steps_b))
    if found is not None:
        rules = replace(rules, maps=found.a, maps_b=found.b)
    per_request = any(step.samples for step in steps_a) and any(step.samples for step in steps_b)
    if rules.requests and not per_request:
        problem = "there are none to pair: not both runs know the rows of requests or samples"
        raise ConfigError("requests", problem)
    more: list[str] = []
    if not per_request:
        rules, more = counted_alike(a, b, rules, (steps_a, steps_b))
        more += _whole_batches(a, b, steps_a, steps_b)
    missing = [*_unusable(a, 0, rules), *_unusable(b, 1, rules)]
    pairs, absent, notes = (match_requests if per_request else _match_steps)(steps_a, steps_b, rules)
    absent = told_once(absent, rules)
    notes = [*more, *spread_note(rules), *notes]
    pairs = [_ordered_alike(each) for each in pairs]
    if found is not None:
        pairs = [replace(each, reordered=True) for each in pairs]
        notes.append(found.note)
    absent, left_out, more_notes = one_sided(steps_a, steps_b, rules, absent)
    if not per_request:
        notes += differing_values(steps_a, steps_b, rules)
    notes += [*more_notes, *_not_stored("A", steps_a), *_not_stored("B", steps_b)]
    if rules.ignore_missing:
        ignored = [each for each in absent if not rules.requires(each)]
        if ignored:
            notes.append(Gap(f"{len(ignored)} tensors that only one run has were left out"))
        left_out += ignored
        absent = [each for each in absent if rules.requires(each)]
    if rules.leave_out:
        named = ", ".join(repr(each.pattern) for each in rules.leave_out)
        notes.append(Gap(f"tensors that fit {named} were not compared, as the rules say"))
    absent += _not_there(pairs, rules)
    if a.state != "complete" or b.state != "complete":
        states = f"A is {a.state}, B is {b.state}"
        notes.append(Gap(f"not every run was closed ({states}); only what was committed can be compared"))
    notes += [*_cut_at_capture(a, b, pairs)]
    notes += _never_captured(a, b, [] if rules.modules else pairs)
    return Matching(pairs, [*missing, *absent], notes, left_out)


def _ordered_alike(pair: Pair) -> Pair:
    """The pair, in the order of the experts only where both sides are."""
    if (pair.a.by is None) == (pair.b.by is None):
        return pair
    return replace(pair, a=replace(pair.a, by=None), b=replace(pair.b, by=None))


def _modules(steps: Sequence[Step]) -> set[str]:
    """The modules of the first steps: later ones have the same."""
    return {str(record["module"]) for step in steps[:_STEPS_LOOKED_AT] for record in step.records}


def _between_tools(a: Run, b: Run, rules: Rules) -> Rules:
    """The rules where another tool than the other's made a run.

    SGLang keeps the hidden state and the residual apart, as vLLM does, and nothing else in two such parts.
    """
    tools = a.document.get("backend"), b.document.get("backend")
    if not (a.is_foreign or b.is_foreign) or tools[0] == tools[1]:
        return rules
    split = any(str(tool).startswith("sglang-") for tool in tools)
    return replace(rules, other_tool=True, sums=rules.sums or ((0, 1) if split else ()))


def _layout(run: Run) -> tuple[int, ...]:
    """How a run's ranks share the model: runs of one layout are compared rank by rank."""
    place = run.ranks.get(0, {})
    return (run.world_size, *(int(place.get(f"{group}_size", 1)) for group in ("tp", "pcp", "pp", "ep")))


def _steps(run: Run, rules: Rules) -> list[Step]:
    return [run.step(number) for number in run.steps if rules.steps is None or number in rules.steps]


def _unusable(run: Run, side: int, rules: Rules) -> Iterator[TensorResult]:
    """A missing result for each step that was asked for, or begun, and is not whole."""
    label = "AB"[side]
    for number in run.incomplete_steps:
        if rules.steps is None or number in rules.steps:
            yield _missing_step(number, f"step {number} of {label} was not committed by every rank")
    held = {*run.steps, *run.incomplete_steps, *(each[side] for each in rules.same_step)}
    for number in sorted((rules.steps or frozenset()) - held):
        yield _missing_step(number, f"{label} has no step {number}")


def _never_captured(a: Run, b: Run, pairs: Sequence[Pair]) -> Iterator[str]:
    """Notes on what neither run was meant to have, or could have."""
    given = [_patterns(run) for run in (a, b)]
    if not any(given) and pairs and not any(pair.key[1] == "" for pair in pairs):
        yield Gap("the model's own inputs and outputs were not captured in both runs")
    for shown in dict.fromkeys(each for each in given if each not in ("", *_ALL)):
        labels = " and ".join(label for label, each in zip("AB", given, strict=True) if each == shown)
        yield Gap(f"{labels} captured only what fits {shown}")


def _cut_at_capture(a: Run, b: Run, pairs: Sequence[Pair]) -> Iterator[str]:
    """Notes on what the runs' configurations left of tensors."""
    chosen = [row_choices(_config(run)) for run in (a, b)]
    for shown in filter(None, dict.fromkeys(chosen)):
        labels = [label for label, each in zip("AB", chosen, strict=True) if each == shown]
        yield Gap(
            f"{' and '.join(labels)} {'has' if len(labels) == 1 else 'have'} chosen rows alone ({shown})"
        )
    for side, label in enumerate("AB"):
        records = (as_stored((pair.a, pair.b)[side].records[0]) for pair in pairs)
        found = dict.fromkeys((r["converted_from"], r["dtype"]) for r in records if "converted_from" in r)
        for before, after in found:
            yield Gap(
                f"what store_dtype rounded away: {label} was stored as {after}, and computed in {before}"
            )


def _config(run: Run) -> Mapping[str, Any]:
    config = run.document.get("config")
    return config if isinstance(config, Mapping) else {}


def _patterns(run: Run) -> str:
    """The patterns of the modules that a run was to capture; empty for all."""
    found = _config(run).get("module_call_match")
    return found if isinstance(found, str) else ", ".join(map(str, found)) if isinstance(found, list) else ""


def _not_there(pairs: Sequence[Pair], rules: Rules) -> Iterator[TensorResult]:
    """A missing result for each pattern that must fit a tensor of both runs and does not."""
    names = {key_name(pair.key) for pair in pairs}
    for pattern in rules.require:
        if not any(pattern.search(name) for name in names):
            reason = f"the rules require a tensor that fits {pattern.pattern!r}, and none was compared"
            yield TensorResult("missing", 0, 0, "", 0, "outputs", (), (None, None), reason=reason)


def _missing_step(step: int, reason: str) -> TensorResult:
    return TensorResult("missing", step, 0, "", 0, "outputs", (), (None, None), reason=reason)


def _not_stored(label: str, steps: Sequence[Step]) -> list[str]:
    notes: list[str] = []
    total = Counts()
    for step in steps:
        total.add(step.ledger)
    for column in ("skipped", "dropped", "failed"):
        count = getattr(total, column)
        if count:
            notes.append(Gap(f"{count} tensors of {label} were {column} at capture: they cannot be compared"))
    return notes


def _match_steps(
    steps_a: Sequence[Step], steps_b: Sequence[Step], rules: Rules
) -> tuple[list[Pair], list[TensorResult], list[str]]:
    pairs: list[Pair] = []
    missing: list[TensorResult] = []
    by_number = rules.by_number(steps_b)
    for step in steps_a:
        mine = keyed(step, rules, rename=True)
        theirs = keyed(by_number[step.number], rules, rename=False) if step.number in by_number else {}
        mine, theirs = _joined(mine, theirs, rules)
        both = [step], [by_number[step.number]] if step.number in by_number else []
        mine, theirs = bridged(mine, theirs, rules, both)
        for key, source in mine.items():
            if key in theirs:
                pairs.append(Pair(key, source, theirs[key]))
            else:
                missing.append(absent(key, source, 0))
        missing += [absent(key, source, 1) for key, source in theirs.items() if key not in mine]
    numbers = {step.number for step in steps_a}
    for number, step in by_number.items():
        if number not in numbers:
            missing += [absent(key, source, 1) for key, source in keyed(step, rules, rename=False).items()]
    return pairs, missing, []


def _joined(
    mine: dict[Key, Located], theirs: dict[Key, Located], rules: Rules
) -> tuple[dict[Key, Located], dict[Key, Located]]:
    """Both sides' tensors, with what ranks have parts of joined where the other side shows how."""
    if rules.spread is None:
        return mine, theirs
    both = (mine, theirs) if rules.spread == 0 else (theirs, mine)
    if rules.both_spread:
        both = held_by_ranks(*both, rules.ranks)
    first, other = with_shards_joined(*both, rules.ranks), both[1]
    return (first, other) if rules.spread == 0 else (other, first)


def _whole_batches(a: Run, b: Run, steps_a: Sequence[Step], steps_b: Sequence[Step]) -> Iterator[str]:
    """A note where only one run tells whose rows are whose."""
    told = [any(step.samples for step in steps) for steps in (steps_a, steps_b)]
    if (a.is_foreign or b.is_foreign) and any(told):
        label = "AB"[told.index(False)]
        yield f"{label} does not tell whose its rows are: tensors are compared whole, step by step"
