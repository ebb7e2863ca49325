"""Tiny random models whose layers tensor-parallel ranks share in ways of their own."""

from __future__ import annotations

from typing import Any

from tests.adapters.vllm.of_transformers import COMMON


def deepseek_v2() -> Any:
    """Latent attention, whose queries alone are shared among ranks, and shared experts beside chosen ones."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    heads = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1}
    more = {"topk_group": 1, "topk_method": "greedy", "moe_intermediate_size": 64, "first_k_dense_replace": 1}
    config = DeepseekV2Config(**COMMON, **heads, **experts, **more, q_lora_rank=None, num_key_value_heads=4)
    return DeepseekV2ForCausalLM(config)


def lfm2() -> Any:
    """Norms of each head's queries and keys, by names of its own, between short convolutions."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    kinds = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "num_key_value_heads": 2}
    # What transformers has named otherwise since, and vLLM reads.
    blocks = {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 192}
    more = {"block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0, "block_norm_eps": 1e-5}
    config = Lfm2Config(**COMMON, **kinds, **blocks, **more, block_auto_adjust_ff_dim=False)
    return Lfm2ForCausalLM(config)


def falcon_h1() -> Any:
    """Attention beside Mamba 2 with one group of B and C, which all ranks hold."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    states = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1}
    more = {"mamba_d_state": 16, "mamba_chunk_size": 64}
    return FalconH1ForCausalLM(FalconH1Config(**COMMON, **states, **more, num_key_value_heads=2))
