"""Tiny random models that vLLM has no class of its own for: it runs transformers' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.models import write_tokenizer

VOCABULARY = 512
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip


def _gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON))


def _olmo2() -> Any:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(Olmo2Config(**COMMON, num_key_value_heads=2))


KINDS: dict[str, Callable[[], Any]] = {"gpt_neox": _gpt_neox, "olmo2": _olmo2}


def write_model(kind: str, directory: Path) -> None:
    """A random checkpoint and its tokenizer."""
    write_random(KINDS[kind], directory)


def write_random(make: Callable[[], Any], directory: Path) -> None:
    """A checkpoint in float32 of a model whose layers all matter, and a tokenizer."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = make().float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(directory)
    write_tokenizer(directory)
