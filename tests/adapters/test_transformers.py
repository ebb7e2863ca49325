"""Transformers' attention, tapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tlcore
from tests.sinks import MemorySink
from tlcore.adapters.transformers import tap_attention


def llama(attention: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, attn_implementation=attention
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_eager_attention_is_tapped() -> None:
    model, sink, x = llama("eager"), MemorySink(), torch.arange(5)[None]
    with torch.no_grad():
        expected = model(x, output_attentions=True)
    capture = tlcore.capture(model, backend=sink, inline=True, module_call_match=[r"self_attn\.tap\."])
    with capture, tap_attention(model), torch.no_grad():
        result = model(x)
    assert torch.equal(result.logits, expected.logits)
    taps = ("q", "k", "v", "probs")
    names = [f"step_0/model.layers.{n}.self_attn/tap.{each}_cpu" for n in range(2) for each in taps]
    assert list(sink.tensors) == names
    for number, probs in enumerate(expected.attentions):
        assert torch.equal(sink.tensors[f"step_0/model.layers.{number}.self_attn/tap.probs_cpu"], probs)
    assert sink.tensors[names[0]].shape == (1, 2, 5, 8)


def test_other_attention_is_refused() -> None:
    model = llama("sdpa")
    with pytest.raises(tlcore.CaptureError, match='attn_implementation="eager"'), tap_attention(model):
        pass
