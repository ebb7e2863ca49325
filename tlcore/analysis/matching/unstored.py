"""Tensors that a run describes and does not hold: they exist, so they must not pass for equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...layout.names import PathKey
from ...reader import Step
from ...record import Json
from ..results import Gap, TensorResult
from .keyed import keyed, renamed
from .pairs import Key
from .rules import Rules


def skipped(step: Step, rules: Rules, rename: bool) -> dict[Key, str]:
    """A step's described tensors that were not stored, with the reason."""
    counts = step.ledger
    if not any((counts.skipped, counts.dropped, counts.failed)):
        return {}
    found: dict[Key, str] = {}
    calls = renamed(rules, rename)
    joins = rules.joins_ranks(0 if rename else 1)
    for rank in step.ranks:
        for name, structure in step.structures(rank).items():
            directory, _, file = name.rpartition("/")
            call = step.call(directory, rank)
            module, index = calls.of(rank, call.module, call.index)
            direction = file.removesuffix(".json")
            if not rules.wants(module, direction):
                continue
            for path, reason in _nodes(structure, ()):
                key = (step.replica(rank) if joins else rank, module, index, direction, path)
                if not rules.leaves_out(key):
                    found[key] = reason
    return found


def _nodes(node: Json, path: tuple[PathKey, ...]) -> Iterator[tuple[tuple[PathKey, ...], str]]:
    if node.get("type") == "tensor":
        if "skipped" in node:
            yield path, str(node["skipped"])
        return
    items = node.get("items", ())
    pairs: Any = items.items() if isinstance(items, Mapping) else enumerate(items)
    for key, child in (*pairs, *node.get("kwargs", {}).get("items", {}).items()):
        yield from _nodes(child, (*path, key))


def one_sided(
    steps_a: Sequence[Step], steps_b: Sequence[Step], rules: Rules, found: Sequence[TensorResult] = ()
) -> tuple[list[TensorResult], list[TensorResult], list[str]]:
    """Missing results for what one run skipped and the other lacks, and what both skipped, with a note.

    What one run skipped and the other stored is missing anyway, since only one has it: ``found`` are these,
    which come back with the reason.
    """
    by_number = rules.by_number(steps_b)
    missing: list[TensorResult] = []
    reasons: tuple[dict[Key, str], dict[Key, str]] = ({}, {})
    both: list[TensorResult] = []
    for step in steps_a:
        other = by_number.pop(step.number, None)
        mine = skipped(step, rules, True)
        theirs = skipped(other, rules, False) if other is not None else {}
        stored_b = keyed(other, rules, rename=False) if other is not None and mine else {}
        stored_a = keyed(step, rules, rename=True) if theirs else {}
        reasons[0].update(mine)
        reasons[1].update(theirs)
        both += [_unstored(step.number, key, "neither run stored it") for key in mine if key in theirs]
        missing += _lacking(step.number, "A", mine, {*theirs, *stored_b})
        missing += _lacking(step.number, "B", theirs, {*mine, *stored_a})
    for step in by_number.values():
        missing += _lacking(step.number, "B", skipped(step, rules, False), set())
    notes = [Gap(f"{len(both)} tensors were stored by neither run and cannot be compared")] if both else []
    return [*(_with_reason(each, reasons) for each in found), *missing], both, [*notes]


def _with_reason(result: TensorResult, reasons: Sequence[Mapping[Key, str]]) -> TensorResult:
    """The result of what only one run holds, with why the other does not."""
    key = result.rank, result.module, result.call, str(result.direction), result.path
    side = 0 if result.names[0] is None else 1
    why = reasons[side].get(key)
    if why is None or result.reason is None:
        return result
    return replace(result, reason=f"{result.reason}; {'AB'[side]} did not store it: {why}")


def _lacking(step: int, label: str, found: Mapping[Key, str], others: set[Key]) -> Iterator[TensorResult]:
    for key, reason in found.items():
        if key not in others:
            yield _unstored(step, key, f"only {label} has it, and did not store it: {reason}")


def _unstored(step: int, key: Key, reason: str) -> TensorResult:
    rank, module, call, direction, path = key
    return TensorResult(
        "missing",
        step,
        rank,
        module,
        call,
        direction,
        path,
        (None, None),
        reason=reason,
    )
