"""Which experts two runs chose for the same tokens, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from .matching.pairs import Pair
from .measure import Tolerance
from .results import Gap, TensorResult

T = TypeVar("T")
_SHOWN = 3
IN_ANOTHER_ORDER = "the same experts in another order"
_OTHERS = "other experts for "


def in_order_of(experts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values of each token in the order of its experts. Raises ValueError where the shapes differ."""
    if experts.shape != values.shape:
        raise ValueError(f"experts of shape {tuple(experts.shape)} for values of {tuple(values.shape)}")
    return values.gather(-1, experts.long().argsort(dim=-1, stable=True))


def other_experts(
    a: torch.Tensor, b: torch.Tensor, logits: Sequence[torch.Tensor | None], first: int | None
) -> str | None:
    """What differs between the experts of the same tokens, given in order; None where nothing does.

    ``first`` is the position of the first token; ``logits`` are those of A and B for all experts, if known.
    """
    a, b = (each.reshape(-1, each.shape[-1]).long() for each in (a, b))
    differing = (a != b).any(-1).nonzero().flatten().tolist()
    if not differing:
        return None
    shown = []
    for token in differing[:_SHOWN]:
        mine, other = a[token].tolist(), b[token].tolist()
        text = f"token {token + (first or 0)}: experts {_set(mine)} against {_set(other)}"
        shown.append(text + _margin(token, set(mine) - set(other), set(other) - set(mine), logits))
    more = len(differing) - len(shown)
    told = "; ".join(shown) + (f"; and {more} more" if more else "")
    return f"{_OTHERS}{len(differing)} of {len(a)} tokens: {told}"


def without_reordered(
    results: Sequence[TensorResult], pieces: Sequence[tuple[Pair, T]], other_batches: bool
) -> tuple[list[TensorResult], list[tuple[Pair, T]], list[Gap]]:
    """The results, and the pairs behind them, without those that differ since they have other rows.

    What modules within the experts compute has rows as the choices and the batch say; added up, it is
    compared anyway.
    """
    inputs = [
        ((each.step, each.rank, each.module), (each.reason or "").startswith((IN_ANOTHER_ORDER, _OTHERS)))
        for each, (pair, _) in zip(results, pieces, strict=True)
        if pair.a.is_experts and each.direction == "inputs"
    ]
    otherwise = {call for call, changed in inputs if changed}
    # Of whose rows these are, nothing is known where they are no request's.
    mixed = {call for call, _ in inputs} if other_batches else set()

    def is_compared(result: TensorResult) -> bool:
        if result.status != "different":
            return True
        parts = result.module.split(".")
        around = {(result.step, result.rank, ".".join(parts[:count])) for count in range(1, len(parts))}
        return not around & otherwise and (result.request is not None or not around & mixed)

    kept = [is_compared(each) for each in results]
    count = len(kept) - sum(kept)
    why = "computed in other batches" if other_batches else "chosen otherwise"
    notes = [Gap(f"{count} tensors within experts that were {why}: their rows are other ones")]
    pairs = [pair for pair, keep in zip(zip(results, pieces, strict=True), kept, strict=True) if keep]
    return [result for result, _ in pairs], [other for _, other in pairs], notes if count else []


def _set(experts: Sequence[int]) -> str:
    return f"{{{','.join(map(str, experts))}}}"


def _margin(token: int, lost: set[int], won: set[int], logits: Sequence[torch.Tensor | None]) -> str:
    """By how much each run's logits prefer the experts that it alone chose."""
    a, b = logits
    if a is None or b is None or not lost or not won:
        return ""
    x, y = (each.reshape(-1, each.shape[-1])[token] for each in (a, b))
    if not all(0 <= each < len(x) for each in lost | won):
        return ""
    before, after = sorted(lost), sorted(won)
    rtol, atol = Tolerance().of(a.dtype, b.dtype)
    x, y = x.double(), y.double()
    near = torch.allclose(x, y, rtol, atol)
    margins = float(x[before].min() - x[after].max()), float(y[after].min() - y[before].max())
    how = "a near tie, the logits agree" if near else f"the logits differ by up to {(x - y).abs().max():.3g}"
    return f" ({how}; they prefer these by {margins[0]:.3g} in A, by {margins[1]:.3g} in B)"
