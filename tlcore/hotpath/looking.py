"""Teaching the extension what a plain tensor is, from tensors that are known to be plain and others.

DLPack says where a tensor's bytes lie, but not whether their signs are to be turned, whether they are zeros
that nobody wrote down, or whether the tensor is one of `torch.func`'s. torch keeps all that in one word of a
tensor's head, which the extension finds by comparing. Where it does not find it, Python looks at tensors.
"""

from __future__ import annotations

from functools import cache

import torch

from .native import extension

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@cache
def can_look() -> bool:
    """Whether the extension is there and can tell plain tensors of this torch from others."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if extension is None or exchange is None:
        return False
    try:
        with torch.inference_mode(False):
            plain, odd = _plain(), _odd()
        with torch.inference_mode():
            plain, odd = plain + _plain(), odd + _odd()
    except (RuntimeError, AttributeError, TypeError):
        # A torch that lacks one of the odd kinds keeps them in another way than is understood here.
        return False
    found: bool = extension.learn(torch.Tensor, exchange, tuple(plain), tuple(odd))
    return found


def _plain() -> list[torch.Tensor]:
    shapes = [torch.zeros((2,) * dimensions) for dimensions in range(6)]
    kinds = [torch.zeros(2, dtype=dtype) for dtype in _DTYPES]
    wanted = torch.zeros(2, requires_grad=True)
    return [*shapes, *kinds, wanted, wanted * 2, torch.zeros(4)[2:]]


def _odd() -> list[torch.Tensor]:
    plain, number = torch.zeros(2), torch.zeros(2, dtype=torch.complex64)
    return [torch._neg_view(plain), torch._efficientzerotensor((2,)), number.conj(), number.conj().imag]
