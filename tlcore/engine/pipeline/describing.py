"""What one side of a call looks like in the files of any step: names, structure document, ledger."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...layout import names
from ...layout.names import PathKey
from ...layout.structure import Scalar, describe
from ...layout.templates import HOLE, STEP_DIR, Template, compact
from ...ledger import Counts
from ...record import Json, Origin, conversion_of
from ...statistics.summary import KEYS
from ..calls import CallSide, Operand, Operator
from ..filters.tensors import TensorSpec


class Described(NamedTuple):
    """A side with certain tensors in it, ready for any step.

    ``stored`` has, for each tensor to be stored, its position among the side's tensors, its name
    without the step's directory, its origin and its spec's kind.
    """

    stored: tuple[tuple[int, str, Origin, int], ...]
    template: Template


def describe_side(
    side: CallSide, specs: Sequence[TensorSpec], scalars: Sequence[Scalar], rank: int
) -> Described:
    """The description of a side with these tensors and scalars, in order."""
    pending = iter(enumerate(specs))
    taken: set[str] = set()
    stored: list[tuple[int, str, Origin, int]] = []

    def tensor(path: tuple[PathKey, ...]) -> Json:
        index, spec = next(pending)
        document = _describe_spec(spec)
        said = conversion_of(spec.dtype, spec.original) if spec.original else {}
        if spec.outcome is not None:
            document["skipped"] = spec.outcome.reason
        if spec.outcome is not None and not spec.measured:
            return document | said
        stem = names.unique(names.stem(side.direction, path, spec.device, rank), taken)
        name = f"/{side.directory}/{stem}"
        if spec.outcome is None:
            document["file"] = f"{STEP_DIR}{name}.pt"
            stored.append((index, name, _origin(side, spec, path, rank), spec.kind))
        else:
            document["name"] = f"{STEP_DIR}{name}"
        document |= said
        if spec.measured:
            document["stats"] = dict.fromkeys(KEYS, HOLE)
        return document

    values = iter(scalars)
    document = describe(side.treespec, (), tensor, values)
    if side.keywords is not None:
        document["kwargs"] = describe(side.keywords, (), tensor, values)
    if side.operator is not None:
        document["operator"] = describe_operator(side.operator)
    return Described(tuple(stored), Template(compact(document)))


def describe_operator(operator: Operator) -> Json:
    """An operator's entry in its result's structure document."""
    document: Json = {
        "name": operator.name,
        "function": operator.function,
        "file": operator.file,
        "line": operator.line,
        "inputs": [_describe_operand(each) for each in operator.inputs],
    }
    if operator.keywords:
        document["kwargs"] = {key: _describe_operand(each) for key, each in operator.keywords}
    return document


def _describe_operand(operand: Operand) -> Any:
    kind, *rest = operand
    if kind == "items":
        return {"items": [_describe_operand(each) for each in rest[0]]}
    return {kind: rest[0], **({"changed_since": True} if len(rest) > 1 else {})}


def _origin(side: CallSide, spec: TensorSpec, path: tuple[PathKey, ...], rank: int) -> Origin:
    tensor = spec.dtype, spec.shape, spec.device, spec.placements, spec.original
    return Origin(rank, side.module, side.call, side.direction, path, *tensor)


def _describe_spec(spec: TensorSpec) -> Json:
    return {
        "type": "tensor",
        "shape": list(spec.shape),
        "dtype": str(spec.dtype),
        "numel": math.prod(spec.shape),
        "device": spec.device,
    }


def count_specs(specs: Sequence[TensorSpec]) -> Counts:
    """The ledger of tensors with these specs, without the stored ones' success."""
    counts = Counts(reasons=Counter())
    for spec in specs:
        outcome = spec.outcome
        if outcome is not None and outcome.column is None:
            continue
        counts.captured += 1
        counts.bytes_captured += spec.captured_bytes
        if outcome is not None and outcome.column is not None:
            setattr(counts, outcome.column, getattr(counts, outcome.column) + 1)
            counts.reasons[f"{outcome.column}: {outcome.reason}"] += 1
    return counts
