"""What a run is of, beside its tensors: software, settings, devices, the model's configuration and weights.

Taken once, when a capture begins, and written into ``run.json``: so two runs can say what they differ in.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn.parameter import is_lazy

from ..record import Json
from ..statistics.weights import in_training, sampled
from .staging.accelerator import device_name

log = logging.getLogger("tlcore")
# Packages that compute, or say what is computed, as far as the process has loaded them.
_PACKAGES = (
    *("transformers", "numpy", "safetensors", "triton", "flash_attn", "flashinfer", "xformers", "peft"),
    *("accelerate", "bitsandbytes", "compressed_tensors", "torchao", "diffusers", "deepspeed"),
)
# So many tensors are looked at, and so many modes told: a few milliseconds, whatever the model's size.
_TENSORS, _MODES = 4096, 4096
_LARGEST_CONFIG = 1 << 16


def environment(model: nn.Module) -> Json:
    """A JSON object; what cannot be told is left out. Changes nothing, and raises nothing."""
    parts: dict[str, Callable[[], Any]] = {
        "model": lambda: f"{type(model).__module__}.{type(model).__qualname__}",
        "packages": _packages,
        "settings": _settings,
        "devices": lambda: _devices(model),
        "configuration": lambda: _configuration(model),
        "weights": lambda: _weights(model),
        "training": lambda: _training(model),
    }
    found: Json = {}
    for name, tell in parts.items():
        try:
            value = tell()
        except Exception:
            # Models may be anything, and what they are made of is no reason to take one down.
            log.debug("%s of a run cannot be told", name, exc_info=True)
        else:
            if value is not None:
                found[name] = value
    return found


def _packages() -> Json:
    loaded = ((name, sys.modules.get(name)) for name in _PACKAGES)
    versions = ((name, getattr(module, "__version__", None)) for name, module in loaded if module is not None)
    return {name: version for name, version in versions if isinstance(version, str)}


def _settings() -> Json:
    return {
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.version.cuda,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "reduced_precision_bfloat16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }


def _devices(model: nn.Module) -> Json:
    found = {}
    for device in sorted({each.device for each in model.parameters()}, key=str):
        if device.type == "cpu":
            found[str(device)] = torch.backends.cpu.get_cpu_capability()
        else:
            found[str(device)] = device_name(device)
    return found


def _configuration(model: nn.Module) -> Json | None:
    """That of a Hugging Face model, without paths and other private keys."""
    config: Any = getattr(model, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return None
    known = {str(key): value for key, value in config.to_dict().items() if not str(key).startswith("_")}
    text = json.dumps(known, default=str)
    if len(text) > _LARGEST_CONFIG:
        return None
    found: Json = json.loads(text, parse_constant=str)
    return found


def _weights(model: nn.Module) -> Json | None:
    """What `sampled` tells of each parameter and buffer, and one hash of it all."""
    named = chain(model.named_parameters(), model.named_buffers())
    tensors = {name: each for name, each in named if not is_lazy(each)}
    chosen = dict(list(tensors.items())[:: max(1, -(-len(tensors) // _TENSORS))])
    if not chosen:
        return None
    told = sampled(chosen)
    whole = xxhash.xxh3_64_hexdigest(json.dumps(told, sort_keys=True).encode())
    return {"fingerprint": whole, "tensors": told, "of": len(tensors)}


def _training(model: nn.Module) -> dict[str, bool]:
    """Whether the model is in training mode, and the modules in another mode than what they lie in."""
    found = {"": model.training}
    for name, module in model.named_modules():
        if len(found) < _MODES and module.training != in_training(found, name):
            found[name] = module.training
    return found
