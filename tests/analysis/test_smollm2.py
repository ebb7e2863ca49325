"""The first divergence in a real model: SmolLM2-135M with one thing changed at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.models import smollm2

pytestmark = pytest.mark.slow
TOKENS = torch.tensor([[504, 2365, 6354, 16438, 27003, 690, 260, 23790]])


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    out = str(tmp_path_factory.mktemp("out"))

    def run(module: Any) -> Path:
        # Large logits add nothing here.
        with (
            torch.inference_mode(),
            tlcore.capture(module, output_dir=out, max_tensor_size=100_000) as captured,
        ):
            module(TOKENS)
        return Path(captured.url)

    return run


@pytest.fixture(scope="module")
def plain(model: Any, dump: Callable[[Any], Path]) -> Path:
    return dump(model)


def divergence(a: Path, b: Path) -> tuple[str, str, bool | None]:
    found = tlcore.compare(a, b).first_divergence
    assert found is not None
    return found.module, found.direction, found.born


def test_a_changed_epsilon(model: Any, plain: Path, dump: Callable[[Any], Path]) -> None:
    norm = model.model.layers[11].post_attention_layernorm
    before = norm.variance_epsilon
    norm.variance_epsilon = 1e-2
    try:
        changed = dump(model)
    finally:
        norm.variance_epsilon = before
    assert divergence(plain, changed) == ("model.layers.11.post_attention_layernorm", "outputs", True)


def test_a_changed_scale_is_born_in_the_attentions_own_code(
    model: Any, plain: Path, dump: Callable[[Any], Path]
) -> None:
    attention = model.model.layers[9].self_attn
    before = attention.scaling
    attention.scaling = before * 2
    try:
        changed = dump(model)
    finally:
        attention.scaling = before
    found = tlcore.compare(plain, changed).first_divergence
    assert found is not None and (found.module, found.direction, found.born, found.within) == (
        *("model.layers.9.self_attn.o_proj", "inputs"),
        *(True, "model.layers.9.self_attn"),
    )


def test_a_single_flipped_bit(model: Any, plain: Path, dump: Callable[[Any], Path]) -> None:
    bits = model.model.layers[5].mlp.up_proj.weight.data.view(torch.int32)
    bits[7, 9] ^= 1 << 29
    try:
        changed = dump(model)
    finally:
        bits[7, 9] ^= 1 << 29
    assert divergence(plain, changed) == ("model.layers.5.mlp.up_proj", "outputs", True)


def test_an_injected_nan(model: Any, plain: Path, dump: Callable[[Any], Path]) -> None:
    def inject(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        broken = output.clone()
        broken[0, 3, 5] = torch.nan
        return broken

    handle = model.model.layers[17].mlp.down_proj.register_forward_hook(inject)
    try:
        changed = dump(model)
    finally:
        handle.remove()
    result = tlcore.compare(plain, changed).first_divergence
    assert result is not None and result.module == "model.layers.17.mlp.down_proj" and result.born
    assert result.result.measures is not None and result.result.measures.nans == (0, 1)


def test_bfloat16_against_float32(model: Any, plain: Path, dump: Callable[[Any], Path]) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    # Value by value; by norm, as is usual between two dtypes, such angles are close.
    result = tlcore.compare(plain, dump(half), rtol=1.6e-2, atol=1e-5)
    first, outputs = result.first_divergence, [r for r in result.results if r.direction == "outputs"]
    # The conversion rounds the rotary frequencies, so the angles are the first values that part.
    assert first is not None and (first.module, first.direction, first.born) == (
        "model.rotary_emb",
        "outputs",
        True,
    )
    # The checkpoint itself is bfloat16: the embedding's values are the same in both.
    embedding = next(r for r in outputs if r.module == "model.embed_tokens")
    assert embedding.measures is not None and embedding.measures.max_abs == 0
