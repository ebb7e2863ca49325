"""What is said of one way of running a model: whether all its rows are right, and which are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ReadError
from ...reader import Run
from .exercised import not_exercised
from .layers import LayerRows, layers_of, rows_of
from .reference import Place, Reference

# How far a row may be from its own, as a part of that one's length: two implementations round differently.
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Asked:
    """A request as it was asked for: its id in the run, its tokens, and how many of them are the prompt's."""

    id: str
    tokens: Sequence[int]
    prompt: int


@dataclass
class Verdict:
    """What was found of one way; it is right where there is no problem."""

    way: str
    requests: int = 0
    layers: int = 0
    rows: int = 0
    # The largest distance from a row's own, as a part of that one's length.
    worst: float = 0.0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether every row of every layer is the right row of the right layer."""
        return not self.problems

    def line(self) -> str:
        """It in one line."""
        rows = f"{self.rows} rows of {self.requests} requests and {self.layers} layers"
        if self.right:
            return f"right  {rows}, at most {self.worst:.1e} off"
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return f"WRONG  {f'{self.wrong} of {rows}: ' if self.wrong else ''}{self.problems[0]}{more}"

    def to_json(self) -> dict[str, Any]:
        """It as a JSON object."""
        return {**vars(self), "right": self.right}


def judge(way: str, run: Run, asked: Sequence[Asked], reference: Reference, tolerance: float) -> Verdict:
    """Hold each row that a run has of its layers against the reference."""
    found = Verdict(way, requests=len(asked))
    try:
        run.verify()
        numbers = layers_of(run)
        found.layers = len(numbers)
        if sorted(numbers.values()) != reference.numbers:
            pair = f"{len(numbers)} in the run, {len(reference.numbers)} in transformers"
            found.problems.append(f"its layers are not those of transformers: {pair}")
            return found
        by_id = {run.request(each.id).request_id: each for each in asked}
        found.problems += _other_tokens(run, by_id)
        seen = _check_rows(run, numbers, by_id, reference, tolerance, found)
        found.problems += _missing(run, by_id, numbers, seen, cached=way == "prefix cache")
        found.problems += not_exercised(way, run, by_id)
    except ReadError as error:
        found.problems.append(str(error))
    return found


def _check_rows(
    run: Run,
    numbers: dict[str, int],
    asked: Mapping[str, Asked],
    reference: Reference,
    tolerance: float,
    found: Verdict,
) -> set[tuple[str, int, int]]:
    """Check every row; the requests, layers and positions that there are."""
    seen = set()
    for rows in rows_of(run, numbers):
        found.rows += len(rows.positions)
        seen |= {(rows.request, rows.number, position) for position in rows.positions}
        problems = list(_problems_of(rows, asked, reference, tolerance, found))
        found.wrong += len(problems)
        found.problems += problems
    return seen


def _problems_of(
    rows: LayerRows, asked: Mapping[str, Asked], reference: Reference, tolerance: float, found: Verdict
) -> Iterator[str]:
    own = asked.get(rows.request)
    for position, row in zip(rows.positions, rows.values, strict=True):
        where = f"step {rows.step}, {rows.module}, request {rows.request}, position {position}"
        if own is None or position >= len(own.tokens):
            yield f"{where}: nobody asked for it"
            continue
        place = Place(rows.number, tuple(own.tokens[: position + 1]))
        true = reference.of(place)
        if true is None or true.shape != row.shape:
            yield f"{where}: there is nothing of its shape to hold it against"
            continue
        error = float((row - true).double().norm())
        part = error / max(float(true.double().norm()), torch.finfo(torch.float32).tiny)
        if not reference.nearer(place, error) and (nearest := reference.nearest(row)) != place:
            yield f"{where}: {_instead(row, nearest, asked)}"
        elif not part <= tolerance:
            yield f"{where}: it is {part:.1e} of its length off"
        else:
            found.worst = max(found.worst, part)


def _instead(row: torch.Tensor, nearest: Place, asked: Mapping[str, Asked]) -> str:
    if not bool(row.isfinite().all()):
        return "it has NaN or Inf"
    if not bool(row.any()):
        return "it is all zeros"
    end = len(nearest.tokens)
    alike = (name for name, each in asked.items() if tuple(each.tokens[:end]) == nearest.tokens)
    owner = next(alike, "another")
    return f"it is nearest to layer {nearest.layer}, request {owner}, position {end - 1}"


def _missing(
    run: Run,
    asked: Mapping[str, Asked],
    numbers: dict[str, int],
    seen: set[tuple[str, int, int]],
    cached: bool,
) -> Iterator[str]:
    """Rows that should be there; those that came from a prefix cache were never computed."""
    known = {
        str(row["request_id"]): int(row.get("cached", 0))
        for step in run.values()
        for row in (step.rows or () if cached else ())
    }
    for name, each in asked.items():
        for module, number in numbers.items():
            # The last token was sampled, and never fed.
            wanted = range(known.get(name, 0), len(each.tokens) - 1)
            lacking = [position for position in wanted if (name, number, position) not in seen]
            if lacking:
                some = f"{len(lacking)} rows are missing, such as that of position {lacking[0]}"
                yield f"{module}, request {name}: {some}"


def _other_tokens(run: Run, asked: Mapping[str, Asked]) -> Iterator[str]:
    for name, each in asked.items():
        told = run.request(name).token_ids.tolist()
        if told != list(each.tokens[: len(told)]) or len(told) < len(each.tokens) - 1:
            yield f"request {name}: its token ids are not those of the answer"
