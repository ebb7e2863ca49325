"""Names of other engines: what is paired, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tlcore.analysis.matching.conventions import apply, naming

LLAMA = [
    "model.embed_tokens",
    "model.layers.11.self_attn.o_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.11",
    "model.norm",
    "lm_head",
]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(
            [
                "embedding.word_embeddings",
                "decoder.layers.11.self_attention.linear_proj",
                "decoder.layers.11.mlp.linear_fc2",
                "decoder.layers.11",
                "decoder.final_layernorm",
                "output_layer",
            ],
            id="megatron",
        ),
        pytest.param([f"module.module.{name}" for name in LLAMA], id="wrapped"),
        pytest.param([f"base_model.model.{name}" for name in LLAMA], id="peft"),
        pytest.param([name.removeprefix("model.") for name in LLAMA], id="without-head"),
        pytest.param(
            ["hook_embed", "blocks.11.attn.o", "none", "blocks.11.hook_resid_post", "none", "unembed"],
            id="transformer-lens",
        ),
        pytest.param(
            [
                "/model/embed_tokens/Gather_output_0",
                "/model/layers.11/self_attn/o_proj/MatMul_output_0",
                "/model/layers.11/mlp/down_proj/Gemm_output_0",
                "/model/layers.11/Add_1_output_0",
                "none",
                "logits",
            ],
            id="onnx",
        ),
    ],
)
def test_names_become_those_of_transformers_whichever_side_they_are_on(names: list[str]) -> None:
    for a, b in ((names, LLAMA), (LLAMA, names)):
        found = naming(a, b)
        assert found is not None
        rows = found.a if a is names else found.b
        renamed = [apply(name, rows) for name in names]
        same = [name for name, llama in zip(renamed, LLAMA, strict=True) if name == llama]
        assert len(same) >= 3 and all(
            name in LLAMA or name == old for name, old in zip(renamed, names, strict=True)
        )


def test_what_is_called_alike_or_pairs_nothing_keeps_its_names() -> None:
    bart = ["model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.fc1"]
    megatron = ["decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.mlp.linear_fc1"]
    for a, b in ((LLAMA, LLAMA), (megatron, megatron), (bart, LLAMA), (bart, megatron), ([], LLAMA)):
        assert naming(a, b) is None


def test_a_layer_whose_rows_are_in_another_order_is_not_paired() -> None:
    vllm = ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"]
    megatron = ["decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.mlp.linear_fc2"]
    found = naming(megatron, vllm)
    assert found is not None
    assert [apply(name, found.a) for name in megatron] == [megatron[0], vllm[1]]


def test_given_maps_are_the_only_ones_and_shapes_of_a_batch_of_one_may_be_turned(tmp_path: Path) -> None:
    x = torch.randn(5, 1, 4)
    save_file({"decoder.layers.0.mlp.linear_fc2": x}, tmp_path / "a.safetensors")
    save_file({"model.layers.0.mlp.down_proj": x.view(1, 5, 4)}, tmp_path / "b.safetensors")
    found = tlcore.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.equal
    assert any("A's as Megatron" in str(note) for note in found.notes)
    given = ["decoder=model", "linear_fc2=down_proj"]
    mapped = tlcore.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors", maps=given)
    assert [each.reason for each in mapped.results] == ["shapes (5, 1, 4) and (1, 5, 4) differ"]
    save_file({"model.layers.0.mlp.down_proj": x.view(5, 1, 4) + 1}, tmp_path / "b.safetensors")
    assert not tlcore.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").equal
