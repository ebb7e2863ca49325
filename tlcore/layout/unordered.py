"""Modules whose tensors have rows in an order of their own, whatever their shapes suggest: known by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from .directions import is_amid

# One of several experts, or a part of experts that are one module, which is given the tokens that have chosen
# it, in an order of its own. What vLLM has within its experts is given all tokens in the batch's order.
_WITHIN = re.compile(
    r"(?:^|\.)(?!_?share)\w*experts?\.(?:\w*_)?[0-9]+(?:\.|$)"
    r"|(?:^|\.)(?!_?share)\w*experts\."
    r"(?!(?:_?shared?_experts?|routed_experts|quant_method|gate|router|runner|base_layer)(?:\.|$))"
    r"|(?:^|\.)(?:mlp|moe|block_sparse_moe)\.(?:in|out)put_linear$"
)
# What has a value for each pair of positions, whosever these are (T5).
_PAIRS = re.compile(r"(?:^|\.)rel(?:ative)?_\w*bias(?:\.|$)")
_EXPERTS = re.compile(r"(?:^|\.)(?!_?share)\w*experts$")


@functools.lru_cache(maxsize=1 << 16)
def is_within_experts(module: str) -> bool:
    """Whether a module is given tokens as its experts sort them."""
    return _WITHIN.search(module) is not None


@functools.lru_cache(maxsize=1 << 16)
def is_nobodys(module: str) -> bool:
    """Whether a module's tensors never have the rows that their shape suggests.

    An expert may be given as many tokens as there are, and in another order: those first whose first choice
    it is, or sorted by expert where each token chooses one. Pairs of positions are as many as samples and
    positions where there are as many of both.
    """
    return is_within_experts(module) or _PAIRS.search(module) is not None


def is_sorted_amid(module: str, direction: str) -> bool:
    """Whether a value is one in the midst of experts, whose code sorts the tokens that it is given."""
    return is_amid(direction) and _EXPERTS.search(module) is not None


def is_sorted(record: Mapping[str, Any]) -> bool:
    """Whether a record's tensor lies as experts sort all the tokens of a batch."""
    module = str(record.get("module", ""))
    return is_within_experts(module) or is_sorted_amid(module, str(record.get("direction", "")))
