"""Values of small tensors on the host, read only where they are asked for, and from a device all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Values = np.ndarray[Any, np.dtype[Any]]


class HostValues:
    """The values of some tensors. To read from a device waits for it, so the first reading takes them all."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._read: dict[str, Values] = {}

    def __getitem__(self, name: str) -> Values:
        """The values of one of them, which on the host are those of the tensor itself, not of a copy."""
        found = self._read.get(name)
        if found is not None:
            return found
        mine = self._tensors[name]
        if mine.is_cpu:
            self._read[name] = _host(mine)
        else:
            near = {key: each for key, each in self._tensors.items() if each.device == mine.device}
            self._read.update(zip(near, together(list(near.values())), strict=True))
        return self._read[name]


def together(tensors: Sequence[torch.Tensor]) -> list[Values]:
    """The values of tensors of one device, in a single transfer where all are whole numbers."""
    if any(each.dtype.is_floating_point for each in tensors):
        return [_host(each.cpu()) for each in tensors]
    packed = torch.cat([each.detach().reshape(-1).to(torch.int64) for each in tensors]).cpu().numpy()
    ends = np.cumsum([each.numel() for each in tensors])[:-1]
    parts = np.split(packed, ends)
    return [part.reshape(tuple(each.shape)) for part, each in zip(parts, tensors, strict=True)]


def _host(tensor: torch.Tensor) -> Values:
    # NumPy has not all floating types that a mask may have.
    found: Values = (tensor.detach().float() if tensor.dtype.is_floating_point else tensor.detach()).numpy()
    return found
