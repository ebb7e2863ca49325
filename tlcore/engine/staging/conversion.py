"""Making a tensor smaller before it is copied: in another dtype, on the device that it is on."""

from __future__ import annotations

import torch

from .row_scale import packed

_WITHOUT_INFINITY = frozenset({torch.float8_e4m3fn})
# Values at a time: what is needed meanwhile is memory that nobody has kept for it.
_PIECE = 1 << 22


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of real numbers in a narrower dtype (int8: rows with a scale); its host does not wait.

    What is finite stays finite: beyond the range of ``dtype`` it becomes the largest number that there is.
    Else a capture would show infinities that the model never had. Those that it had become NaN where the
    dtype has none.
    """
    with torch.no_grad():
        values = tensor.detach()
        if dtype == torch.int8:
            return packed(values)
        if values.numel() <= _PIECE:
            return _narrowed(values, dtype)
        flat = values.reshape(-1)
        narrow = torch.empty(flat.shape, dtype=dtype, device=flat.device)
        for begin in range(0, flat.numel(), _PIECE):
            end = begin + _PIECE
            narrow[begin:end].copy_(_narrowed(flat[begin:end], dtype))
        return narrow.view(values.shape)


def _narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    infinite = torch.full_like(values, torch.nan) if dtype in _WITHOUT_INFINITY else values
    return torch.where(values.isinf(), infinite, values.clamp(-limit, limit)).to(dtype)
