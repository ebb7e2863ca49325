"""A script that shows a difference by itself: with torch and the module's own package, without tlcore."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import ReadError
from .given import on_each
from .minimise import Smallest
from .modules import Recipe

_TEMPLATE = '''"""{title}

Run beside {data}, which has the inputs, the expected result and, where the module is small, its weights.
"""

import pathlib

import torch

saved = torch.load(pathlib.Path(__file__).with_name({data!r}), weights_only=True)
{recipe}
with torch.no_grad():
    result = module(*saved["args"], **saved["kwargs"])


def part(value, path):
    for key in path:
        value = value[key] if not isinstance(key, str) or hasattr(value, "keys") else getattr(value, key)
    return value


for path, expected in saved["expected"]:
    found = part(result, path)
    off = (found.double() - expected.double()).abs().max().item()
    print(f"outputs{{list(path)}}: {{tuple(found.shape)}}, off by {{off:.3g}} at most")
    torch.testing.assert_close(found, expected, check_dtype=False{tolerance})
'''


def write_script(
    target: str | os.PathLike[str],
    smallest: Smallest,
    recipe: Recipe,
    title: str,
    tolerance: Mapping[str, float | None],
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
        "expected": [(list(path), each) for path, each in smallest.expected.items()],
        **recipe.saved(),
    }
    torch.save(saved, data)
    given = {key: value for key, value in tolerance.items() if value is not None}
    if len(given) == 1:
        given = {"rtol": 0.0, "atol": 0.0, **given}
    text = "".join(f", {key}={value!r}" for key, value in given.items())
    script.write_text(
        _TEMPLATE.format(title=title, data=data.name, recipe=recipe.code(), tolerance=text), encoding="utf-8"
    )
    return script, data


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each, where) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_plain(each, where) for each in value]
        return items if isinstance(value, list) else tuple(items)
    raise ReadError(f"argument {where} is a {type(value).__name__}, which a script cannot be given")
