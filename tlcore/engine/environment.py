"""What a run is of, beside its tensors: software, settings, devices, the model's configuration and weights.

Taken once, when a capture begins, and written into ``run.json``: so two runs can say what they differ in.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.nn.parameter import is_lazy

from ..record import Json
from .staging.accelerator import device_name

log = logging.getLogger("tlcore")
# Packages that compute, or say what is computed, as far as the process has loaded them.
_PACKAGES = (
    *("transformers", "numpy", "safetensors", "triton", "flash_attn", "flashinfer", "xformers", "peft"),
    *("accelerate", "bitsandbytes", "compressed_tensors", "torchao", "diffusers", "deepspeed"),
)
# So many values of each of so many tensors are looked at: a few milliseconds, whatever the model's size.
_SAMPLED, _TENSORS = 64, 4096
_LARGEST_CONFIG = 1 << 16
_GOLDEN = 0.6180339887498949
_PLAIN = (nn.Parameter, torch.Tensor)


def environment(model: nn.Module) -> Json:
    """A JSON object; what cannot be told is left out. Changes nothing, and raises nothing."""
    parts: dict[str, Callable[[], Any]] = {
        "model": lambda: f"{type(model).__module__}.{type(model).__qualname__}",
        "packages": _packages,
        "settings": _settings,
        "devices": lambda: _devices(model),
        "configuration": lambda: _configuration(model),
        "weights": lambda: _weights(model),
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
    """A hash of some values of each parameter and buffer, with its dtype and shape; of others, of the class.

    The values are gathered on their devices and fetched at once. What is sampled is the same in every run.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    tensors = {name: each for name, each in named if not is_lazy(each)}
    chosen = dict(list(tensors.items())[:: max(1, -(-len(tensors) // _TENSORS))])
    if not chosen:
        return None
    samples: dict[str, bytes] = {}
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    places: dict[tuple[int, torch.device], torch.Tensor] = {}
    with torch.no_grad():
        for name, each in chosen.items():
            if _readable(each):
                by_device[each.device].append((name, _sampled(each.detach(), places)))
        for gathered in by_device.values():
            values = torch.cat([each for _, each in gathered]).cpu().numpy()
            ends = np.cumsum([each.numel() for _, each in gathered])
            parts = np.split(values, ends[:-1])
            samples |= {name: part.tobytes() for (name, _), part in zip(gathered, parts, strict=True)}
    tensors_told = {}
    for name, each in chosen.items():
        dtype = str(each.dtype).removeprefix("torch.")
        told = f"{dtype} {tuple(each.shape)} ".encode() + samples.get(name, type(each).__name__.encode())
        tensors_told[name] = f"{dtype} {xxhash.xxh3_64_hexdigest(told)}"
    whole = xxhash.xxh3_64_hexdigest(json.dumps(tensors_told, sort_keys=True).encode())
    return {"fingerprint": whole, "tensors": tensors_told, "of": len(tensors)}


def _readable(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.device.type != "meta" and tensor.numel() > 0


def _sampled(tensor: torch.Tensor, places: dict[tuple[int, torch.device], torch.Tensor]) -> torch.Tensor:
    """Some values, spread over the tensor, as float64."""
    count = tensor.numel()
    at = places.get((count, tensor.device))
    if at is None:
        spread = (np.arange(min(count, _SAMPLED)) * _GOLDEN) % 1 * count
        at = places[count, tensor.device] = torch.from_numpy(spread.astype(np.int64)).to(tensor.device)
    # Not every torch picks values out of tensors of eight-bit floats.
    picked = tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    if tensor.is_contiguous():
        picked = picked.view(-1)[at]
    else:
        picked = picked[torch.unravel_index(at, tensor.shape)] if tensor.dim() else picked.view(-1)
    values = picked.view(tensor.dtype)
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj()).reshape(-1)
    return (
        values.to(torch.float32).to(torch.float64) if values.dtype.itemsize < 2 else values.to(torch.float64)
    )
