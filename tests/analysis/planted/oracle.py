"""How large a fault is and how large the noise, measured in float64 by plain hooks, without tlcore."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils import _pytree

from .faults import Fault
from .subjects import LENGTH, SUBJECTS, batch_dependent_kernels, token_ids

SAMPLES = 2
Seen = list[torch.Tensor]


def times_the_noise(fault: Fault, batches: Sequence[int]) -> float:
    """The fault's size in the tensors that show it first, over the noise of the batches there.

    Sizes are those of the whole or of the worst row, whichever tells more. The fault's is that in a model in
    float64; the noise is no less than half a unit in the last place.
    """
    subject = SUBJECTS[fault.subject]
    sizes = _largest(_apart(*(seen_at(fault, 2, wide=True, planted=each) for each in (False, True))))
    runs = [seen_at(fault, each) for each in batches]
    least = torch.finfo(subject.dtype).eps / 2
    noises = [_largest(_apart(runs[0], other)) for other in runs[1:]]
    levels = [max([least, *each]) for each in zip(*noises, strict=True)] if noises else [least, least]
    return max(size / level for size, level in zip(sizes, levels, strict=True))


def seen_at(fault: Fault, batch: int, wide: bool = False, planted: bool = False) -> Seen:
    """What a run has at the fault's site, of the first samples."""
    model = SUBJECTS[fault.subject].prepare()
    if planted:
        fault.plant(model)
    if wide:
        model.double()
    found: list[Any] = []
    name, direction, call = fault.site
    module = model.get_submodule(name)
    if direction == "outputs":
        module.register_forward_hook(lambda _, args, outputs: found.append(outputs))
    else:
        module.register_forward_pre_hook(lambda _, args: found.append(args))
    kernels = nullcontext() if wide else batch_dependent_kernels()
    with torch.inference_mode(), kernels:
        SUBJECTS[fault.subject].call(model, token_ids(batch))
    tensors = [each for each in _pytree.tree_leaves(found[call]) if isinstance(each, torch.Tensor)]
    return [_of_samples(each.double(), batch) for each in tensors if each.is_floating_point()]


def _of_samples(x: torch.Tensor, batch: int) -> torch.Tensor:
    if x.shape[0] == batch * LENGTH:
        return x[: SAMPLES * LENGTH]
    return x[:SAMPLES] if x.shape[0] == batch else x


def _apart(a: Seen, b: Seen) -> list[tuple[float, float]]:
    """Relative to their norm, and to that of the worst row; infinite for a NaN."""
    found = []
    for x, y in zip(a, b, strict=True):
        rows = (x - y).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-300)
        each = float((x - y).norm() / x.norm().clamp_min(1e-300)), float(rows.max())
        found.append(tuple(torch.inf if size != size else size for size in each))
    return [(whole, row) for whole, row in found]


def _largest(sizes: list[tuple[float, float]]) -> tuple[float, float]:
    return max(whole for whole, _ in sizes), max(row for _, row in sizes)


__all__ = ["SAMPLES", "seen_at", "times_the_noise"]
