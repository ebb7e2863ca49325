"""Tiny random models with layers of other kinds: states instead of attention, several planes of states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.models import write_tokenizer

VOCABULARY, PLANES = 512, 4
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
_ATTENTION = {
    "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


def _mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    states = {"state_size": 32, "num_heads": 8, "head_dim": 32, "expand": 2, "n_groups": 1, "chunk_size": 16}
    return Mamba2ForCausalLM(Mamba2Config(**_COMMON, **states, num_hidden_layers=3))


def _granite() -> Any:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    states = {f"mamba_{key}": value for key, value in _STATES.items()}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96}
    layers = {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope"}
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(**_COMMON, **_ATTENTION, **states, **experts, **layers)
    )


def _gemma3n() -> Any:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    more = {
        "vocab_size_per_layer_input": VOCABULARY, "head_dim": 32, "hidden_size_per_layer_input": 16,
        "altup_num_inputs": PLANES, "laurel_rank": 8, "num_kv_shared_layers": 0, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
    }  # fmt: skip
    return Gemma3nForCausalLM(Gemma3nTextConfig(**_COMMON, **_ATTENTION, **more))


def _falcon_h1() -> Any:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    states = {f"mamba_{key}": value for key, value in _STATES.items()}
    return FalconH1ForCausalLM(FalconH1Config(**_COMMON, **_ATTENTION, **states, mamba_d_ssm=256))


_STATES = {"n_heads": 8, "d_head": 32, "n_groups": 1, "d_state": 32, "expand": 2, "chunk_size": 16}
KINDS: dict[str, Callable[[], Any]] = {
    "mamba2": _mamba2,
    "granite": _granite,
    "gemma3n": _gemma3n,
    "falcon_h1": _falcon_h1,
}


def write_model(kind: str, directory: Path) -> None:
    """A random checkpoint in float32 whose layers all matter, and its tokenizer."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = KINDS[kind]().float()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv1d" not in name:
                parameter.normal_(0, 0.08)
            elif "dt_bias" in name:
                parameter.normal_(-2, 0.5)
    model.save_pretrained(directory)
    write_tokenizer(directory)
