"""Whether two tensors have memory in common: views of one tensor often lie side by side in it."""

from __future__ import annotations

import torch

# Sizes and strides in bytes, of dimensions with more than one place.
_Dims = list[tuple[int, int]]
# By tensors of other kinds, nested ones for instance.
_REFUSED = (RuntimeError, NotImplementedError, TypeError, AttributeError)


def storage_of(tensor: torch.Tensor | None) -> int | None:
    """A number that is the same for what shares storage; None where there is none, as in sparse tensors."""
    try:
        return None if tensor is None else int(tensor.untyped_storage()._cdata)
    except _REFUSED:
        return None


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a byte of theirs may be the same; parts of one projection are told apart."""
    storage = storage_of(one)
    if storage is None or storage != storage_of(other) or not one.numel() or not other.numel():
        return False
    try:
        begins = [each.storage_offset() * each.element_size() for each in (one, other)]
        dims = [_dims(each) for each in (one, other)]
    except _REFUSED:
        return True
    widths = [each.element_size() for each in (one, other)]
    while True:
        spans = [
            width + sum((size - 1) * stride for size, stride in each)
            for width, each in zip(widths, dims, strict=True)
        ]
        if begins[0] + spans[0] <= begins[1] or begins[1] + spans[1] <= begins[0]:
            return False
        if not dims[0] or not dims[1] or dims[0][0][1] != dims[1][0][1]:
            return True
        # Rows that are as far apart in both: what matters is where within a row each lies.
        pitch = dims[0][0][1]
        begins = [each % pitch for each in begins]
        for place in (0, 1):
            size, stride = dims[place].pop(0)
            if begins[place] + spans[place] - (size - 1) * stride > pitch:
                return True


def _dims(tensor: torch.Tensor) -> _Dims:
    """From the widest stride on."""
    width = tensor.element_size()
    found = [
        (size, stride * width)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride
    ]
    return sorted(found, key=lambda each: -each[1])
