"""Experts in plain PyTorch for vLLM's workers on a CPU, whose own kernel knows no expert parallelism.

Named as ``worker_extension_cls``: importing it in a worker puts the kernel in the place of vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


class Extension:
    """Adds nothing to a worker."""


def _apply(self: Any, *, output: torch.Tensor, hidden_states: torch.Tensor, **given: Any) -> None:
    ids, weights, here = given["topk_ids"].long(), given["topk_weights"], given["expert_map"]
    if here is not None:
        ids = here.long()[ids]
    output.zero_()
    for expert in range(len(given["w1"])):
        token, place = torch.where(ids == expert)
        gate, up = torch.nn.functional.linear(hidden_states[token], given["w1"][expert]).chunk(2, -1)
        found = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, given["w2"][expert])
        output.index_add_(0, token, found * weights[token, place, None])


def _patch(experts: Any) -> None:
    experts.process_weights_after_loading = lambda self, layer: None
    experts.apply = _apply


_patch(CPUUnquantizedExperts)
