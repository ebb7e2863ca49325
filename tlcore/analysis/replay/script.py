"""A script that shows a difference by itself: with torch and the module's own package, without tlcore."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import ReadError
from ..measure import Tolerance
from .again import SEED
from .given import on_each
from .minimise import Smallest
from .modules import Recipe

_TEMPLATE = '''"""{title}

Run beside {data}, which has the inputs, the expected result and, where the module is small, its weights.
"""

import pathlib

import torch

saved = torch.load(pathlib.Path(__file__).with_name({data!r}), weights_only=True{where})
{recipe}
torch.manual_seed({seed})
with torch.no_grad():
    result = module(*saved["args"], **saved["kwargs"])


def part(value, path):
    for key in path:
        value = value[key] if not isinstance(key, str) or hasattr(value, "keys") else getattr(value, key)
    return value


def near(off, size, rtol, atol):
    """Whether the whole is, and each row within four times of that."""
    if not off.numel():
        return True
    whole = off.norm() <= rtol * size.norm() or off.square().mean().sqrt() <= atol
    if off.dim() < 2:
        return bool(whole)
    errors, norms = off.norm(dim=-1).flatten(), size.norm(dim=-1).flatten()
    scale = norms.clamp(min=norms.quantile(0.5).item())
    rows = (errors <= 4 * rtol * scale) | (errors <= 4 * atol * off.shape[-1] ** 0.5)
    return bool(whole and rows.all())


for path, expected, rtol, atol, by_norm in saved["expected"]:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = part(result, path).cpu().to(wide), expected.cpu().to(wide)
    name = "outputs" + "".join(f"[{{key!r}}]" for key in path)
    assert found.shape == expected.shape, f"{{name}}: {{found.shape}} is not {{expected.shape}}"
    same = (found == expected) | (found.isnan() & expected.isnan())
    off = (found - expected).abs().masked_fill(same, 0.0)
    most = off.max().item() if off.numel() else 0.0
    print(f"{{name}}: {{tuple(found.shape)}}, off by {{most:.3g}} at most")
    if by_norm:
        size = found.abs().masked_fill(~(found.isfinite() & expected.isfinite()), 0.0)
        assert near(off, size, rtol, atol), f"{{name}} are not close"
    else:
        # Of two such values the second is the one that the tolerance is relative to.
        torch.testing.assert_close(expected, found, rtol=rtol, atol=atol, equal_nan=True)
'''


def write_script(
    target: str | os.PathLike[str],
    smallest: Smallest,
    recipe: Recipe,
    title: str,
    tolerance: Tolerance,
) -> tuple[Path, Path]:
    """Write a script, and beside it a ``.pt`` file with what it needs; returns both.

    Raises ReadError where an argument is no tensor, number, text or container of these.
    """
    script = Path(target)
    data = script.with_suffix(".pt")
    args, kwargs = on_each((smallest.arguments.args, smallest.arguments.kwargs), torch.Tensor.cpu)
    saved = {
        "args": [_plain(each, str(place)) for place, each in enumerate(args)],
        "kwargs": {key: _plain(each, key) for key, each in kwargs.items()},
        "expected": [_expected(path, each, recipe, tolerance) for path, each in smallest.expected.items()],
        **recipe.saved(),
    }
    torch.save(saved, data)
    where = "" if recipe.device is None else f", map_location={recipe.device!r}"
    text = _TEMPLATE.format(title=title, data=data.name, recipe=recipe.code(), where=where, seed=SEED)
    script.write_text(text, encoding="utf-8")
    return script, data


def _expected(path: tuple[Any, ...], tensor: torch.Tensor, recipe: Recipe, tolerance: Tolerance) -> list[Any]:
    """A part of the stored result, and how far from it is agreement, as `replay` has it."""
    again = recipe.dtype if recipe.dtype is not None and tensor.is_floating_point() else tensor.dtype
    allowed = tolerance.between(tensor.dtype, again)
    return [list(path), tensor, *allowed.of(tensor.dtype, again), allowed.norm]


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, complex, str, torch.dtype)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each, where) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_plain(each, where) for each in value]
        return items if isinstance(value, list) else tuple(items)
    raise ReadError(f"argument {where} is a {type(value).__name__}, which a script cannot be given")
