"""What is said of the tensors of a mixture of experts, by how tokens and experts are spread over ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tlcore.adapters.vllm.worker.expert_sharding import expert_parts

SUM = {"outputs": {"": {"sum": True}}}


class Layer(nn.Module):
    """Told from other modules by where vLLM has its own."""

    __module__ = "vllm.model_executor.layers.fused_moe.layer"

    def __init__(self, reduced: bool = False, **config: Any) -> None:
        super().__init__()
        self.moe_config = SimpleNamespace(**config)
        self.quant_method = nn.Identity()
        if reduced:
            kernel: Any = SimpleNamespace(output_is_reduced=lambda: True)
            self.quant_method.moe_kernel = kernel


def parts(**config: Any) -> dict[str, Any]:
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.gate, model.mlp.experts, model.norm = nn.Identity(), Layer(**config), nn.Identity()
    return expert_parts(dict(model.named_modules()))


@pytest.mark.parametrize("config", [{"tp_size": 2}, {"ep_size": 2, "tp_size": 1}, {"ep_size": 4}])
def test_each_rank_has_a_part_of_the_sum(config: dict[str, Any]) -> None:
    assert parts(**config) == {"mlp.experts.quant_method": SUM}


def test_what_a_kernel_has_added_up_is_whole() -> None:
    assert parts(tp_size=2, reduced=True) == parts(tp_size=1) == {}


def test_a_sum_that_is_left_to_what_follows_is_a_part_too() -> None:
    found = parts(tp_size=2, skip_final_all_reduce=True)
    assert found == {"mlp.experts": SUM, "mlp.experts.quant_method": SUM}


@pytest.mark.parametrize(
    ("config", "within", "reason"),
    [
        ({"dp_size": 2}, {"mlp.experts.quant_method"}, "tokens of several data-parallel ranks"),
        (
            {"tp_size": 2, "is_sequence_parallel": True},
            {"mlp.gate", "mlp.experts", "mlp.experts.quant_method"},
            "sequence parallelism splits",
        ),
    ],
)
def test_where_tokens_are_shared_nothing_is_joined(
    config: dict[str, Any], within: set[str], reason: str
) -> None:
    found = parts(**config)
    assert found.keys() == within
    for each in found.values():
        assert reason in each["inputs"]["*"]["unknown"] and reason in each["outputs"]["*"]["unknown"]
