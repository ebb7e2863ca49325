"""Rows of int8 that end in their scale, made on the device that a tensor is on (`layout.row_scale`)."""

from __future__ import annotations

import torch

from ...layout.row_scale import CUT, INFINITY, NAN, QUIET_NAN, SCALE_BYTES

# The smallest float32 that no device takes for zero, and the largest of which 127 are still finite.
_SMALLEST, _LARGEST = 2.0**-126, float.fromhex("0x1.020406p+121")
_MOST = 127.0
# Values at a time: what is needed meanwhile is memory that nobody has kept for it.
_PIECE = 1 << 22


def packed(values: torch.Tensor) -> torch.Tensor:
    """Floating values ``[..., C]`` as int8 ``[..., C + 4]``; its host does not wait for a device.

    No finite value is farther than half its row's scale from what it is restored to, but for those of float64
    that are beyond float32. NaN and infinities are kept where they are.
    """
    *outer, width = values.shape
    rows = values.reshape(-1, width)
    found = torch.empty((rows.shape[0], width + SCALE_BYTES), dtype=torch.int8, device=values.device)
    at_once = max(1, _PIECE // width)
    for begin in range(0, rows.shape[0], at_once):
        end = begin + at_once
        _pack(rows[begin:end], found[begin:end])
    return found.view(*outer, width + SCALE_BYTES)


def _pack(rows: torch.Tensor, into: torch.Tensor) -> None:
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    values = rows.to(exact)
    least, most = values.aminmax(dim=-1, keepdim=True)
    size = torch.maximum(-least, most)
    # Asking a device would wait for it.
    if values.is_cpu and bool(size.isfinite().all()):
        scale = (size / _MOST).clamp_(_SMALLEST, _LARGEST).to(torch.float32)
        into[:, :-SCALE_BYTES] = (values / scale).round_().clamp_(-_MOST, _MOST)
        into[:, -SCALE_BYTES:] = _bytes(scale)
        return
    finite = values.isfinite()
    size = torch.where(finite, values, 0).abs().amax(-1, keepdim=True)
    plain = finite.all(-1, keepdim=True)
    # Made of tensors: of two numbers alone torch would make the default dtype, which may be any.
    steps = _MOST - 1 + plain.to(exact)
    largest = _LARGEST * (2 - plain.to(exact))
    bits = (size / steps).clamp(min=_SMALLEST).minimum(largest).to(torch.float32).view(torch.int32)
    # Rounded up, to what a NaN can carry.
    bits = torch.where(plain, bits, ((bits + (1 << CUT) - 1) >> CUT) << CUT)
    steps_of = (values / bits.view(torch.float32)).round().clamp(-steps, steps)
    odd = torch.where(values.isnan(), float(NAN), values.sign() * INFINITY)
    into[:, :-SCALE_BYTES] = torch.where(finite, steps_of, odd)
    into[:, -SCALE_BYTES:] = _bytes(torch.where(plain, bits, (bits >> CUT) | QUIET_NAN))


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """The bytes of numbers of 32 bits ``[rows, 1]``, whatever their strides."""
    return words.reshape(-1).view(torch.int8).view(-1, SCALE_BYTES)
