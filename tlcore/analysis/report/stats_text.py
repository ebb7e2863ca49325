"""A survey as rows of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...layout.names import call_name
from ..stats import TensorStatistics

COLUMNS = (
    *("step", "module", "direction", "dtype", "shape", "min", "max", "mean", "std", "L2"),
    *("zeros", "NaN", "Inf", "problem"),
)
NUMBERS = ("step", "min", "max", "mean", "std", "L2", "zeros", "NaN", "Inf")


def noticeable(tensor: TensorStatistics) -> bool:
    """Whether a tensor has a NaN or an infinity, or cannot be read."""
    values = tensor.values
    return values is None or bool(values.nans or values.infs)


def rows(tensors: Sequence[TensorStatistics]) -> Iterator[tuple[str, ...]]:
    """The cells of each tensor, under `COLUMNS`."""
    for tensor in tensors:
        module = call_name(tensor.module, tensor.call)
        path = "".join(f"[{key}]" for key in tensor.path)
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        yield (
            *(str(tensor.step), module, tensor.direction + path, tensor.dtype, shape),
            *_numbers(tensor),
            tensor.problem or "",
        )


def _numbers(tensor: TensorStatistics) -> tuple[str, ...]:
    found = tensor.values
    if found is None:
        return ("",) * 8
    floats = (found.min, found.max, found.mean, found.std, found.l2)
    counts = (found.zeros, found.nans, found.infs)
    return (*("-" if each is None else f"{each:.4g}" for each in floats), *map(str, counts))
