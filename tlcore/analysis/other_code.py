"""Where the code of a module uses other operators in one run than in the other."""

from __future__ import annotations

from collections.abc import Sequence

from ..layout.directions import is_operator
from ..layout.names import shown_module
from ..reader import Run
from .operators import operator_of
from .results import TensorResult


def other_code(missing: Sequence[TensorResult], runs: tuple[Run, Run]) -> list[str]:
    """Where the code of a module uses other operators in one run than in the other, if anywhere."""
    alone = [each for each in missing if is_operator(each.direction)]
    if not alone:
        return []
    first = min(alone, key=lambda each: (each.step, int(each.direction.split(".")[1])))
    own = [each for each in alone if (each.step, each.module, each.call) == _call(first)]
    texts = []
    for side, run in enumerate(runs):
        mine = [each for each in own if each.names[side] is not None]
        found = operator_of(run, mine[0].names[side], mine[0].rank) if mine else None
        texts.append(f"{'AB'[side]} uses {found if found is not None else 'none there'}")
    where = shown_module(first.module)
    return [f"the code of {where} uses other operators from {first.direction} on: {', '.join(texts)}"]


def _call(result: TensorResult) -> tuple[int, str, int]:
    return result.step, result.module, result.call
