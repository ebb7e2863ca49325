"""The statistics of a tensor by one kernel: a program for each piece, which reads its bytes once.

Needs Triton; imported only where a device is about to use it. What it writes is what `device` writes with
many operations of torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from .fingerprint import LANES
from .summary import MOMENTS

# The values of the others (8-bit floats, complex numbers) are not known to every device's compiler.
DTYPES = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
    )
)
# Whose values the kernel makes from their bits: a compiler may take the smallest bfloat16s for 0.
_AS_BITS = {torch.bool: torch.uint8, torch.bfloat16: torch.int16}
_ALIGNED = 4


def measure(flat: torch.Tensor, keys: torch.Tensor, piece_words: int) -> torch.Tensor:
    """The vector of a contiguous tensor of one dimension that is not empty, of one of `DTYPES`.

    ``keys`` are those of the fingerprint, ``[lanes, words of a block]``, on the same device; ``piece_words``
    is how many 32-bit words make a piece. Raises what the compiler raises.
    """
    dtype = flat.dtype
    if dtype in _AS_BITS:
        flat = flat.view(_AS_BITS[dtype])
    if flat.data_ptr() % _ALIGNED:
        flat = flat.clone()
    data = flat.view(torch.uint8)
    pieces = -(-data.numel() // (4 * piece_words))
    found = torch.empty((pieces, len(MOMENTS) + LANES), dtype=torch.int64, device=flat.device)
    with _current(flat.device):
        _measure[(pieces,)](
            *(flat, data, keys, found, found.view(torch.float64), flat.numel(), data.numel()),
            VALUES=4 * piece_words // flat.dtype.itemsize,
            WORDS=piece_words,
            PIECES_OF_BLOCK=keys.shape[1] // piece_words,
            HALF=dtype == torch.float16,
            BFLOAT=dtype == torch.bfloat16,
            SCALED=dtype == torch.float64,
            num_warps=8,
        )
    return found.view(-1)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensor's."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return nullcontext()
    block: AbstractContextManager[Any] = module.device(device)
    return block


@triton.jit(do_not_specialize=["numel", "nbytes"])  # type: ignore[untyped-decorator]
def _measure(
    values: tl.tensor,
    data: tl.tensor,
    keys: tl.tensor,
    found: tl.tensor,
    found_float: tl.tensor,
    numel: tl.tensor,
    nbytes: tl.tensor,
    VALUES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    PIECES_OF_BLOCK: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    BFLOAT: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
) -> None:
    piece = tl.program_id(0)
    row = piece.to(tl.int64) * 12

    at = piece.to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = at < numel
    value = tl.load(values + at, mask=inside, other=0)
    if BFLOAT:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if HALF:
        value = value.to(tl.float32)
    value = value.to(tl.float64)
    _moments(value, inside, found_float + row, SCALED)

    word_at = piece.to(tl.int64) * WORDS + tl.arange(0, WORDS)
    word = _words(data, word_at, nbytes)
    key = keys + (piece % PIECES_OF_BLOCK) * WORDS + tl.arange(0, WORDS)
    for lane in tl.static_range(3):
        tl.store(
            found + row + 9 + lane,
            tl.sum(word * tl.load(key + lane * PIECES_OF_BLOCK * WORDS)),
        )


@triton.jit  # type: ignore[untyped-decorator]
def _moments(value: tl.tensor, inside: tl.tensor, target: tl.tensor, SCALED: tl.constexpr) -> None:  # noqa: N803
    finite = inside & (value - value == 0.0)
    count = tl.sum(finite.to(tl.int32))
    low = tl.min(tl.where(finite, value, float("inf")))
    high = tl.max(tl.where(finite, value, float("-inf")))
    scale = tl.full((), 1.0, tl.float64)
    if SCALED:
        largest = tl.maximum(tl.abs(low), tl.abs(high))
        scale = tl.where((largest > 0.0) & (largest < float("inf")), largest, scale)
    clean = tl.where(finite, value, 0.0) / scale
    mean = tl.sum(clean) / tl.maximum(count, 1).to(tl.float64)
    mean = tl.minimum(tl.maximum(mean, low / scale), high / scale)
    apart = tl.where(finite, clean - mean, 0.0)
    nans = tl.sum((inside & (value != value)).to(tl.int32))
    tl.store(target + 0, count.to(tl.float64))
    tl.store(target + 1, low)
    tl.store(target + 2, high)
    tl.store(target + 3, scale)
    tl.store(target + 4, mean)
    tl.store(target + 5, tl.sum(apart * apart))
    tl.store(target + 6, tl.sum((inside & (value == 0.0)).to(tl.int32)).to(tl.float64))
    tl.store(target + 7, nans.to(tl.float64))
    infinite = tl.sum((inside & (tl.abs(value) == float("inf"))).to(tl.int32))
    tl.store(target + 8, infinite.to(tl.float64))


@triton.jit  # type: ignore[untyped-decorator]
def _words(data: tl.tensor, word_at: tl.tensor, nbytes: tl.tensor) -> tl.tensor:
    whole = nbytes // 4
    words = data.to(tl.pointer_type(tl.int32), bitcast=True)
    word = tl.load(words + word_at, mask=word_at < whole, other=0).to(tl.int64)
    # The last word, where the bytes do not fill it, ends with zeros.
    rest = nbytes - whole * 4
    last = data + whole * 4
    tail = tl.load(last, mask=rest > 0, other=0).to(tl.int64)
    tail += tl.load(last + 1, mask=rest > 1, other=0).to(tl.int64) * 256
    tail += tl.load(last + 2, mask=rest > 2, other=0).to(tl.int64) * 65536
    return tl.where(word_at == whole, tail, word)
