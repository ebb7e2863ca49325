"""Modules that are no parts of the model to PyTorch, as they lie in a plain list or dictionary of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlcore


class _Holder(nn.Module):
    """Calls what it keeps past PyTorch's bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))]
        self.by_task = {"a": nn.Linear(4, 4), "b": self.first}
        object.__setattr__(self, "teacher", nn.Linear(4, 4))
        # References back, which are no parts.
        self.numbers: list[Any] = list(range(5))
        self.me = [self]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in (self.first, *self.rest, *self.by_task.values(), vars(self)["teacher"]):
            x = each(x)
        return x


class _Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Holder()
        vars(self.inner)["above"] = (self,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


ASIDE = ["rest.0", "rest.1", "rest.1.0", "by_task.a", "teacher"]


def test_modules_in_lists_and_dictionaries_are_captured(tmp_path: Path) -> None:
    model, x = _Parent(), torch.randn(2, 4)
    plain = model(x)
    with tlcore.capture(model, output_dir=str(tmp_path), inline=True) as capture:
        assert torch.equal(model(x), plain)
    step = tlcore.open_run(capture.url).step(0)
    assert [each for each in step.calls if each != "_root"] == [
        "inner", "inner.first", *(f"inner.{each}" for each in ASIDE[:4]), "inner.first_1", "inner.teacher",
    ]  # fmt: skip
    assert torch.equal(step["step_0/inner.teacher/outputs_cpu"], plain)
    assert capture.ledger.balanced and not capture.ledger.failed


def test_they_are_found_by_patterns_and_looked_at_anew(tmp_path: Path) -> None:
    model, x = _Holder(), torch.randn(2, 4)
    keys: dict[str, Any] = {"module_call_match": [r"rest\."], "log_step_ids": []}
    with tlcore.capture(model, output_dir=str(tmp_path), inline=True, **keys) as capture:
        model(x)
        model.rest.append(nn.Tanh())
        expected = model(x)
    run = tlcore.open_run(capture.url)
    assert run.step(0).calls == ["rest.0", "rest.1", "rest.1.0"]
    assert run.step(1).calls == ["rest.0", "rest.1", "rest.1.0", "rest.2"]
    assert expected.shape == (2, 4)


def test_what_a_part_refers_back_to_is_not_captured(tmp_path: Path) -> None:
    parent, x = _Parent(), torch.randn(2, 4)
    with tlcore.capture(parent.inner, output_dir=str(tmp_path), inline=True) as capture:
        parent(x)
    calls = tlcore.open_run(capture.url).step(0).calls
    assert not any("above" in each for each in calls) and "teacher" in calls
