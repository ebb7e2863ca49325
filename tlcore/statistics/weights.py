"""What is told of a model's weights and modes: enough to see later that they are other ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
import xxhash
from torch import nn

# So many values of each tensor are looked at.
SAMPLED = 64
_GOLDEN = 0.6180339887498949
_PLAIN = (nn.Parameter, torch.Tensor)


def in_training(told: Mapping[str, bool], module: str) -> bool | None:
    """Whether a module was in training mode, by the modes of those that differ from what they lie in."""
    while module and module not in told:
        module = module.rpartition(".")[0]
    return told.get(module)


def sampled(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of each tensor its dtype and a hash of that, its shape and `SAMPLED` of its values.

    The values are gathered on their devices and fetched at once. What is sampled is the same in every run.
    Of a tensor that cannot be read the class counts in place of the values.
    """
    samples: dict[str, bytes] = {}
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    places: dict[tuple[int, torch.device], torch.Tensor] = {}
    with torch.no_grad():
        for name, each in tensors.items():
            if _readable(each):
                by_device[each.device].append((name, _sample(each.detach(), places)))
        for gathered in by_device.values():
            values = torch.cat([each for _, each in gathered]).cpu().numpy()
            ends = np.cumsum([each.numel() for _, each in gathered])
            parts = np.split(values, ends[:-1])
            samples |= {name: part.tobytes() for (name, _), part in zip(gathered, parts, strict=True)}
    found = {}
    for name, each in tensors.items():
        dtype = str(each.dtype).removeprefix("torch.")
        told = f"{dtype} {tuple(each.shape)} ".encode() + samples.get(name, type(each).__name__.encode())
        found[name] = f"{dtype} {xxhash.xxh3_64_hexdigest(told)}"
    return found


def _readable(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.device.type != "meta" and tensor.numel() > 0


def _sample(tensor: torch.Tensor, places: dict[tuple[int, torch.device], torch.Tensor]) -> torch.Tensor:
    """Some values, spread over the tensor, as float64."""
    count = tensor.numel()
    at = places.get((count, tensor.device))
    if at is None:
        spread = (np.arange(min(count, SAMPLED)) * _GOLDEN) % 1 * count
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
