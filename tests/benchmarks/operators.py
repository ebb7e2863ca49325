"""What the operators of one decoder layer cost: a Llama layer of SmolLM2-135M's size, eager, on the CPU.

The first steps of a run are told apart: meanwhile names and templates are made in the background, for about
as long as five decode steps of one layer take. Later ones are so many that what is done in the background for
several at once is in their time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import tlcore

from .rows import Row, Scale, at_most
from .timing import interleaved, ratio, timed

_FIRST_STEPS = 5
_OPS = [r"^layer\b"]
# Tokens of a step, and how many steps are measured.
_WHAT = {"a prompt's": (256, 5), "a decode step's": (8, 60)}


class _OneLayer(nn.Module):
    """The layer with what it is given besides the hidden states."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=size * 9, intermediate_size=size * 24, num_hidden_layers=1, num_attention_heads=9,
            num_key_value_heads=3, attn_implementation="eager", vocab_size=64,
        )  # fmt: skip
        self.layer = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """One pass of the layer."""
        places = torch.arange(hidden.shape[1])[None]
        found = self.layer(hidden, position_embeddings=self.rotary(hidden, places), position_ids=places)
        result: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return result


def table(scale: Scale) -> list[Row]:
    """The layer's time with its operators captured, against none and against its modules alone."""
    size = 8 if scale.tiny else 64
    model = _OneLayer(size).eval()
    rows: list[Row] = []
    for what, (tokens, steps) in _WHAT.items():
        hidden = torch.randn(1, tokens, size * 9)
        rows += _rows(what, model, hidden, scale.pairs, steps)
    return rows


def _rows(what: str, model: nn.Module, hidden: torch.Tensor, pairs: int, steps: int) -> list[Row]:
    measures: dict[str, Callable[[], float]] = {"plain": lambda: _plain(model, hidden, steps)}
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
        for name, ops, planned, count in (
            ("modules", [], True, steps),
            ("operators", _OPS, True, steps),
            ("first", _OPS, False, _FIRST_STEPS),
        ):
            measures[name] = lambda ops=ops, planned=planned, count=count: _captured(  # type: ignore[misc]
                model, hidden, directory, ops, planned, count
            )
        times = interleaved(measures, pairs)
    base = f"{median(times['plain']) * 1e3:.3g} ms plain"
    return [
        Row(
            f"{what} layer, its operators captured / plain",
            ratio(times, "operators", "plain"),
            at_most(3),
            "",
            base,
        ),
        Row(
            f"{what} layer, the same of a run's steps 1 to 5", ratio(times, "first", "plain"), None, "", base
        ),
        Row(f"{what} layer, its modules captured / plain", ratio(times, "modules", "plain"), None, "", base),
    ]


def _plain(model: nn.Module, hidden: torch.Tensor, steps: int) -> float:
    with torch.inference_mode():
        model(hidden)
        return _step(model, hidden, steps)


def _step(model: nn.Module, hidden: torch.Tensor, steps: int) -> float:
    """One step's time, of several that follow one another."""
    return timed(lambda: [model(hidden) for _ in range(steps)]) / steps


def _captured(
    model: nn.Module, hidden: torch.Tensor, directory: str, ops: list[str], planned: bool, steps: int
) -> float:
    """A captured step, while the one before is stored, when all is ``planned`` or from the second one on."""
    with (
        torch.inference_mode(),
        tlcore.capture(
            model, output_dir=directory, backend="safetensors", log_step_ids=[], ops=ops
        ) as capture,
    ):
        if planned:
            for _ in range(2):
                model(hidden)
            capture.session.flush()
        model(hidden)
        return _step(model, hidden, steps)
