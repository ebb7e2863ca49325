"""The rows that a run has of a model's layers, as what each layer handed on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...layout.grids import as_rows
from ...layout.rows import Span
from ...reader import Run, Step
from ...record import Json

# A module in a list of modules that is in no other such list: layers, but none of their experts.
LAYERS = r"^\D+\.\d+$"
_NUMBERED = re.compile(r"(\D+)\.(\d+)")


@dataclass(frozen=True)
class LayerRows:
    """Rows that follow one another: those of ``request`` at ``positions`` behind the layer ``number``."""

    step: int
    module: str
    number: int
    request: str
    positions: range
    values: torch.Tensor


def layer_numbers(modules: Iterable[str]) -> dict[str, int]:
    """The numbers of a model's layers by their modules' names: those of the longest list of modules."""
    lists: dict[str, dict[str, int]] = defaultdict(dict)
    for module in modules:
        if found := _NUMBERED.fullmatch(module):
            lists[found[1]][module] = int(found[2])
    return max(lists.values(), key=len, default={})


def layers_of(run: Run) -> dict[str, int]:
    """The layers of a run's first step that has any, with their numbers."""
    for step in run.values():
        if found := layer_numbers(str(record["module"]) for record in step.records):
            return found
    return {}


def rows_of(run: Run, numbers: dict[str, int]) -> Iterator[LayerRows]:
    """All rows of a run's requests behind each of its layers, in every step that computed them."""
    for step in run.values():
        for records in _results(step, numbers):
            first = records[0]
            number = numbers[str(first["module"])]
            whole = sum_of(step.tensor(record["name"]) for record in records)
            for span in map(Span.kept, step.row_spans(first)):
                if span.length and span.first is not None:
                    rows = as_rows(whole, span.axis)[span.begin : span.begin + span.length]
                    positions = range(span.first, span.first + span.length)
                    request = str(span.row["request_id"])
                    yield LayerRows(step.number, str(first["module"]), number, request, positions, rows)


def _results(step: Step, numbers: dict[str, int]) -> Iterator[list[Json]]:
    """The records that make up what each call of a layer handed on, as the lowest rank has them."""
    calls: dict[tuple[Any, ...], dict[tuple[Any, ...], Json]] = defaultdict(dict)
    for record in step.records:
        if record["module"] in numbers and record["direction"] == "outputs":
            calls[record["module"], record["call"]].setdefault(tuple(record["path"]), record)
    for paths in calls.values():
        whole, first, second = (paths.get(path) for path in ((), (0,), (1,)))
        chosen = whole or first
        if chosen is None:
            continue
        # vLLM's layers hand on what is still to be added to the residual, and the residual.
        added = second if whole is None and second and second["shape"] == chosen["shape"] else None
        yield [chosen] if added is None else [chosen, added]


def sum_of(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, in float32."""
    listed = [part.float() for part in parts]
    return listed[0] if len(listed) == 1 else torch.stack(listed).sum(0)
