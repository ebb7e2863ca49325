"""Random LoRA adapters of the tiny model, and what it is with each of them merged into its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny_llama

RANK, ALPHA = 8, 16
NAMES = ("alpha", "beta")
_TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def write_adapter(directory: Path, name: str) -> tuple[Path, Path]:
    """The directories of an adapter, and of the checkpoint that has it merged."""
    adapter, merged = directory / name, directory / f"{name}-merged"
    adapter.mkdir()
    shutil.copytree(tiny_llama(), merged)
    torch.manual_seed(NAMES.index(name))
    whole, parts = load_file(tiny_llama() / "model.safetensors"), dict[str, torch.Tensor]()
    for key, weight in whole.items():
        if any(target in key for target in _TARGETS):
            down, up = 0.3 * torch.randn(RANK, weight.shape[1]), 0.3 * torch.randn(weight.shape[0], RANK)
            prefix = f"base_model.model.{key.removesuffix('.weight')}"
            parts |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
            weight += ALPHA / RANK * (up @ down)
    save_file(parts, adapter / "adapter_model.safetensors")
    save_file(whole, merged / "model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": _TARGETS, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return adapter, merged
