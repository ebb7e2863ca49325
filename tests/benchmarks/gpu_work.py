"""What is captured on a device: random Llamas of two sizes; a prefill or a decode step, eager or replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Hidden size, intermediate size, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "toy": (64, 128, 2, 4, 2, 128),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
}
_CONTEXT = 256


@dataclass(frozen=True)
class Work:
    """A step that may be repeated: the same shapes, addresses and values each time."""

    what: str
    model: nn.Module
    step: Callable[[], Any]
    tokens: int
    device: torch.device

    def settle(self) -> None:
        """Return when the device has done all that it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def llama(shape: str, device: torch.device) -> nn.Module:
    """A random Llama of a known size in bfloat16, made on the device: no checkpoint is needed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2 * _CONTEXT,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def works(shape: str, model: nn.Module, batches: tuple[int, ...], device: torch.device) -> Iterator[Work]:
    """A prefill of one prompt, then one decode step of each number of requests."""
    vocabulary = SHAPES[shape][-1]
    prompt = torch.arange(_CONTEXT, device=device).view(1, -1) % vocabulary
    yield Work(
        f"{shape}, prefill of {_CONTEXT} tokens",
        model,
        lambda: model(input_ids=prompt, use_cache=False),
        _CONTEXT,
        device,
    )
    for batch in batches:
        yield Work(
            f"{shape}, decode, batch {batch}", model, _decode(model, batch, vocabulary, device), batch, device
        )


def _decode(model: Any, batch: int, vocabulary: int, device: torch.device) -> Callable[[], Any]:
    """One token for each request behind a context that stays as it is, in memory that stays where it is."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=_CONTEXT + 1)
    tokens = torch.arange(batch * _CONTEXT, device=device).view(batch, -1) % vocabulary
    with torch.inference_mode():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = tokens[:, :1].contiguous()
    places = torch.full((batch, 1), _CONTEXT, device=device)
    lengths = [layer.cumulative_length for layer in cache.layers]

    def step() -> Any:
        # Each step writes the same row again, as its graph will.
        for length in lengths:
            length.fill_(_CONTEXT)
        return model(input_ids=last, past_key_values=cache, position_ids=places, use_cache=True)

    return step


@contextmanager
def recorded(work: Work) -> Iterator[Work]:
    """The same step as a CUDA graph, which is replayed."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        for _ in range(3):
            work.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        work.step()
    yield Work(f"{work.what}, replayed graph", work.model, graph.replay, work.tokens, work.device)
    work.settle()
    graph.reset()
