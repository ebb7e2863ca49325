"""Small random models of transformers, their batches, and what is captured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.reader import Run

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [20, 21, 22, 23, 24, 25, 26]]
LAYER = "model.layers.1/outputs_cpu"
LOGITS = "_root/outputs_logits_cpu"


def llama(**keys: Any) -> Any:
    """A random Llama; a test that asks for it is skipped where there is no transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **keys})).eval()


def t5() -> Any:
    """A random model of encoder and decoder, likewise."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    sizes["pad_token_id"] = 63
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0)
    ).eval()


def padded(prompts: Sequence[list[int]], left: bool = True, more: int = 0) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts)) + more
    ids, mask = [], []
    for each in prompts:
        rest = length - len(each)
        ids.append([0] * rest + each if left else each + [0] * rest)
        mask.append([0] * rest + [1] * len(each) if left else [1] * len(each) + [0] * rest)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def run_of(model: nn.Module, path: Path, act: Callable[[tlcore.capture], Any], **keys: Any) -> Run:
    keys = {"log_step_ids": [], **keys}
    with torch.inference_mode(), tlcore.capture(model, output_dir=str(path), **keys) as capture:
        act(capture)
    assert capture.ledger.balanced
    return tlcore.open_run(capture.url)


def forward(model: nn.Module, path: Path, batch: dict[str, torch.Tensor], **keys: Any) -> Run:
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return run_of(model, path, lambda _: model(**batch, position_ids=positions), **keys)


def generated(model: Any, path: Path, batch: dict[str, torch.Tensor], new: int = 4, **keys: Any) -> Run:
    options = keys.pop("options", {})

    def act(_: Any) -> None:
        model.generate(**batch, max_new_tokens=new, do_sample=False, **options)

    return run_of(model, path, act, **keys)
