"""Runs of two codes that compute nearly the same: the operator that only one uses, and its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.analysis import Comparison

Code = Callable[["Model", torch.Tensor], Any]
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(5))


class Model(nn.Module):
    """Its code is given, so that it stands in lines of this file."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.code = code

    def forward(self, x: torch.Tensor) -> Any:
        return self.code(self, x)


def right(model: Model, x: torch.Tensor) -> Any:
    h = model.one(x)
    h = h.sin()
    scores = torch.matmul(h, h.transpose(1, 2)) * 0.5
    h = torch.matmul(scores.softmax(-1), h)
    h = torch.cat((-h[..., :3], h[..., 3:]), -1)
    return model.two(h * 2.0) + x


def one_more(model: Model, x: torch.Tensor) -> Any:
    h = model.one(x)
    h = h.sin()
    scores = torch.matmul(h, h.transpose(1, 2)) * 0.5
    h = torch.matmul((scores * 3.0).softmax(-1), h)
    h = torch.cat((-h[..., :3], h[..., 3:]), -1)
    return model.two(h * 2.0) + x


def one_less(model: Model, x: torch.Tensor) -> Any:
    h = model.one(x)
    h = h.sin()
    scores = torch.matmul(h, h.transpose(1, 2)) * 0.5
    h = torch.matmul(scores.softmax(-1), h)
    h = torch.cat((h[..., :3], h[..., 3:]), -1)
    return model.two(h * 2.0) + x


def another(model: Model, x: torch.Tensor) -> Any:
    h = model.one(x)
    h = h.cos()
    scores = torch.matmul(h, h.transpose(1, 2)) * 0.5
    h = torch.matmul(scores.softmax(-1), h)
    h = torch.cat((-h[..., :3], h[..., 3:]), -1)
    return model.two(h * 2.0) + x


def another_at_the_end(model: Model, x: torch.Tensor) -> Any:
    h = model.one(x)
    h = h.sin()
    scores = torch.matmul(h, h.transpose(1, 2)) * 0.5
    h = torch.matmul(scores.softmax(-1), h)
    h = torch.cat((-h[..., :3], h[..., 3:]), -1)
    return model.two(h * 2.0) - x


def several(model: Model, x: torch.Tensor) -> Any:
    h = model.one(x)
    h = h.exp().log1p()
    h = h.tanh()
    scores = torch.matmul(h, h.transpose(1, 2)) * 0.5
    h = torch.matmul(scores.softmax(-1), h)
    h = torch.cat((-h[..., :3], h[..., 3:]), -1)
    return model.two(h * 2.0) + x


def harmless(model: Model, x: torch.Tensor) -> Any:
    h = model.one(x).contiguous()
    h = h.sin()
    scores = torch.matmul(h, h.transpose(1, 2)) * 0.5
    h = torch.matmul(scores.softmax(-1), h).clone()
    h = torch.cat((-h[..., :3], h[..., 3:]), -1)
    return model.two(h * 2.5) + x


def captured(code: Code, directory: Path) -> str:
    model = Model(code)
    with tlcore.capture(model, output_dir=str(directory), ops=[".*"]) as capture, torch.no_grad():
        model(X)
    return str(capture.url)


def text_at(file: str, line: int) -> str:
    return Path(file).read_text(encoding="utf-8").splitlines()[line - 1].strip()


def used(found: Comparison) -> list[tuple[str, str] | None]:
    """The name of each run's operator, and the line that calls it."""
    first = found.first_divergence
    assert first is not None and first.operator is not None, str(first)
    sides = (first.operator.a, first.operator.b)
    return [None if each is None else (each.name, text_at(each.file, each.line)) for each in sides]


NEG, CAT = "h = torch.cat((-h[..., :3], h[..., 3:]), -1)", "h = torch.cat((h[..., :3], h[..., 3:]), -1)"
EXPECTED: dict[Code, list[tuple[str, str] | None]] = {
    one_more: [None, ("mul", "h = torch.matmul((scores * 3.0).softmax(-1), h)")],
    one_less: [("neg", NEG), None],
    another: [("sin", "h = h.sin()"), ("cos", "h = h.cos()")],
    another_at_the_end: [("add", "return model.two(h * 2.0) + x"), ("sub", "return model.two(h * 2.0) - x")],
    several: [("sin", "h = h.sin()"), ("exp", "h = h.exp().log1p()")],
}


@pytest.mark.parametrize("code", EXPECTED)
def test_the_operator_that_only_one_code_uses_is_named(tmp_path: Path, code: Code) -> None:
    urls = captured(right, tmp_path), captured(code, tmp_path)
    for side in (0, 1):
        expected = EXPECTED[code][:: 1 - 2 * side]
        found = tlcore.compare(urls[side], urls[1 - side])
        assert used(found) == expected, str(found.first_divergence)
        assert found.first_divergence is not None and found.first_divergence.born
        shown = "born where the code is another: A uses " + ("none there" if expected[0] is None else "")
        assert shown in str(found.first_divergence)
        operator = found.first_divergence.to_json()["operator"]
        assert operator["other_code"] and (operator["a"] is None) == (expected[0] is None)
        # Also where what only one run has counts for nothing.
        assert used(tlcore.compare(urls[side], urls[1 - side], ignore_missing=True)) == expected


def test_operators_behind_others_that_change_nothing_are_held_against_their_own(tmp_path: Path) -> None:
    found = tlcore.compare(captured(right, tmp_path), captured(harmless, tmp_path), ignore_missing=True)
    assert used(found) == [
        ("mul", "return model.two(h * 2.0) + x"),
        ("mul", "return model.two(h * 2.5) + x"),
    ]
    assert found.first_divergence is not None and "code is another" not in str(found.first_divergence)
    agreeing = {
        each.direction.split(".")[2] for each in found.results if each.agrees and "op." in each.direction
    }
    assert {"sin", "softmax", "cat", "neg", "matmul"} <= agreeing
