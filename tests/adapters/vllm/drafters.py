"""Speculators made from the tiny model so that some of what they propose is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny_llama

SIZE, VOCABULARY, HEADS = 128, 512, 3
_LAYER = "model.layers.3."
Weights = dict[str, torch.Tensor]


class Again:
    """A speculator of one's own: the last token will follow itself."""

    def __init__(self, vllm_config: Any) -> None:
        self._count = int(vllm_config.speculative_config.num_speculative_tokens)

    def load_model(self, *_: Any, **__: Any) -> None:
        """There is none."""

    def propose(self, sampled: Sequence[Sequence[int]], *_: Any, **__: Any) -> list[list[int]]:
        """What may follow the tokens that were sampled for each request; nothing within a prompt."""
        return [[*new[-1:]] * self._count for new in sampled]


def target_of(method: str, directory: Path) -> Path:
    """The target model of a speculator: the tiny one, but for one that brings its own speculator."""
    if method != "mtp":
        return tiny_llama()
    _with_own_speculator(directory / "target")
    return directory / "target"


def speculator(method: str, directory: Path) -> dict[str, Any]:
    """vLLM's ``speculative_config`` of a speculator, whose checkpoint is written into ``directory``."""
    found: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method in ("ngram", "ngram_gpu"):
        return {**found, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    if method == "suffix":
        return {**found, "suffix_decoding_min_token_prob": 0.01}
    if method == "extract_hidden_states":
        layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]}}
        return {**found, "num_speculative_tokens": 1, "draft_model_config": layers}
    if method == "custom_class":
        return {**found, "model": f"{__name__}.{Again.__name__}"}
    if method in _WRITTEN:
        (directory / "draft").mkdir()
        _WRITTEN[method](directory / "draft")
        found["model"] = str(directory / "draft")
    return found


def _weights() -> Weights:
    torch.manual_seed(0)
    return load_file(tiny_llama() / "model.safetensors")


def _write(directory: Path, weights: Mapping[str, torch.Tensor], **config: Any) -> None:
    save_file(
        {name: each.clone(memory_format=torch.contiguous_format) for name, each in weights.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    known = json.loads((tiny_llama() / "config.json").read_text())
    known["num_hidden_layers"] = 1
    (directory / "config.json").write_text(json.dumps({**known, **config}))


def _draft_model(directory: Path) -> None:
    """The target itself, with other weights in its last layer."""
    shutil.copytree(tiny_llama(), directory, dirs_exist_ok=True)
    weights = _weights()
    for name, weight in weights.items():
        if "layers.3.mlp" in name:
            weight += torch.randn_like(weight) * weight.std()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _eagle(directory: Path) -> None:
    """A layer on the target's states, and the embedding of the token after each, which tells the most."""
    weights = {
        name.replace(_LAYER, "layers.0."): each
        for name, each in _weights().items()
        if name.startswith(_LAYER) and "input_layernorm" not in name
    }
    weights["fc.weight"] = torch.cat([50 * torch.eye(SIZE), torch.eye(SIZE)], 1)
    _write(directory, weights, architectures=["EagleLlamaForCausalLM"])


def _eagle3(directory: Path) -> None:
    """A layer on the states of three of the target's layers."""
    own = _weights()
    weights = {
        name.replace(_LAYER, "midlayer."): torch.cat([each, each], 1) if ".self_attn.o" not in name else each
        for name, each in own.items()
        if name.startswith(f"{_LAYER}self_attn")
    }
    weights |= {
        name.replace(_LAYER, "midlayer."): each
        for name, each in own.items()
        if name.startswith(_LAYER) and "self_attn" not in name
    }
    weights["midlayer.hidden_norm.weight"] = weights["norm.weight"] = torch.ones(SIZE)
    weights["fc.weight"] = torch.cat([torch.zeros(SIZE, 2 * SIZE), torch.eye(SIZE)], 1)
    weights["lm_head.weight"] = own["lm_head.weight"]
    layers = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    _write(directory, weights, architectures=["LlamaForCausalLMEagle3"], eagle_config=layers)


def _dflash(directory: Path) -> None:
    """Two layers, each of which hands half of the mean of the context's states to every token of a block."""
    own = _weights()
    weights = {f"{name}.weight": torch.ones(SIZE) for name in ("norm", "hidden_norm")}
    weights["fc.weight"] = torch.cat([torch.zeros(SIZE, 2 * SIZE), torch.eye(SIZE)], 1)
    weights["lm_head.weight"] = own["lm_head.weight"]
    half = SIZE // 2
    for layer in (0, 1):
        mine = slice(layer * half, (layer + 1) * half)
        value, output = torch.zeros(half, SIZE), torch.zeros(SIZE, SIZE)
        value[:, mine] = torch.eye(half)
        # Of four heads, each two share what they attend to.
        output[mine, :32], output[mine, 64:96] = torch.eye(half)[:, :32], torch.eye(half)[:, 32:]
        parts = {"q": torch.zeros(SIZE, SIZE), "k": torch.zeros(half, SIZE), "v": value, "o": output}
        weights |= {f"layers.{layer}.self_attn.{k}_proj.weight": v for k, v in parts.items()}
        weights |= {f"layers.{layer}.self_attn.{k}_norm.weight": torch.ones(32) for k in "qk"}
        weights |= {
            f"layers.{layer}.mlp.{k}_proj.weight": torch.zeros(SIZE, SIZE) for k in ("gate", "up", "down")
        }
        weights |= {
            f"layers.{layer}.{k}_layernorm.weight": torch.ones(SIZE) for k in ("input", "post_attention")
        }
    block = {"target_layer_ids": [0, 1, 2], "mask_token_id": 2, "causal": True}
    known = {"model_type": "qwen3", "architectures": ["DFlashDraftModel"], "head_dim": 32}
    _write(directory, weights, **known, num_hidden_layers=2, dflash_config=block)


def _dspark(directory: Path) -> None:
    known = {"model_type": "qwen3", "architectures": ["Qwen3DSparkModel"], "block_size": 4}
    _write(directory, {}, **known, mask_token_id=2, target_layer_ids=[0, 1, 2])


def _mlp_speculator(directory: Path) -> None:
    _write(directory, {}, model_type="mlp_speculator", architectures=["MLPSpeculatorPreTrainedModel"])


def _medusa(directory: Path) -> None:
    """Three heads on the target's last state."""
    head = _weights()["lm_head.weight"]
    weights = {f"blocks.{i}.layers.0.weight": 0.01 * torch.randn(SIZE, SIZE) for i in range(HEADS)}
    weights |= {f"lm_heads.{i}.weight": head.clone() for i in range(HEADS)}
    known = {"model_type": "medusa", "architectures": ["MedusaModel"], "truncated_vocab_size": VOCABULARY}
    _write(directory, weights, **known, num_heads=HEADS)


_WRITTEN: dict[str, Callable[[Path], None]] = {
    "draft_model": _draft_model,
    "eagle": _eagle,
    "eagle3": _eagle3,
    "dflash": _dflash,
    "dspark": _dspark,
    "medusa": _medusa,
    "mlp_speculator": _mlp_speculator,
}


def _with_own_speculator(directory: Path) -> None:
    """A random mixture of experts with a layer more, which predicts the token after next (MTP)."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(4)
    model = Glm4MoeForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama() / name, directory / name)
    weights = load_file(directory / "model.safetensors")
    extra = {
        name.replace("layers.1.", "layers.2."): each.clone()
        for name, each in weights.items()
        if ".layers.1." in name
    }
    own = "model.layers.2."
    extra[f"{own}eh_proj.weight"] = torch.cat([torch.eye(SIZE), 0.1 * torch.eye(SIZE)], 1)
    extra |= {f"{own}{each}.weight": torch.ones(SIZE) for each in ("enorm", "hnorm", "shared_head.norm")}
    extra[f"{own}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    extra[f"{own}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file({**weights, **extra}, directory / "model.safetensors", {"format": "pt"})
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 1}))
