"""Stored results in the dtype of the model that they are injected into, and what is rounded on the way."""

from __future__ import annotations

import torch


def unlike(stored: torch.dtype, own: torch.dtype) -> str | None:
    """Why nothing of a dtype can stand for a result of another; None where it can, if perhaps rounded."""
    if stored == own or (stored.is_floating_point and own.is_floating_point):
        return None
    if stored.is_complex and own.is_complex:
        return None
    return f"the other run's result is {shown(stored)}, and its own {shown(own)}"


def rounded_rows(stored: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
    """Which rows of a stored tensor are others in a dtype that it was converted into, true or false each."""
    back = fitted.to(device=stored.device, dtype=stored.dtype)
    same = (back == stored) | ((back != back) & (stored != stored))
    return ~same.reshape(len(stored), -1).all(1)


def rounding(stored: torch.dtype, own: torch.dtype) -> str:
    """What one was rounded to, in words."""
    return f"{shown(stored)} to {shown(own)}"


def shown(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")
