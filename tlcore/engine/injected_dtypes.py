"""Stored results in the dtype of the model that they are injected into, and what is rounded on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch


def unlike(stored: torch.dtype, own: torch.dtype) -> str | None:
    """Why nothing of a dtype can stand for a result of another; None where it can, if perhaps rounded."""
    if stored == own or (stored.is_floating_point and own.is_floating_point):
        return None
    if stored.is_complex and own.is_complex:
        return None
    return f"the other run's result is {shown(stored)}, and its own {shown(own)}"


class Conversion(NamedTuple):
    """Which rows of a tensor are others in another dtype, true or false each, and of these which overflowed.

    Those have a finite number that the dtype has not: it became infinite, or NaN where there is no infinity.
    """

    changed: torch.Tensor
    overflowed: torch.Tensor


def conversion(stored: torch.Tensor, fitted: torch.Tensor) -> Conversion:
    """What became of a stored tensor's rows in the dtype that it was converted into."""
    back = fitted.to(device=stored.device, dtype=stored.dtype)
    same = (back == stored) | ((back != back) & (stored != stored))
    lost = torch.isfinite(stored) & ~torch.isfinite(back)
    return Conversion(~same.reshape(len(stored), -1).all(1), lost.reshape(len(stored), -1).any(1))


def rounding(stored: torch.dtype, own: torch.dtype) -> str:
    """What one was rounded to, in words."""
    return f"{shown(stored)} to {shown(own)}"


def shown(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")
