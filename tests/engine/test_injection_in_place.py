"""``inject`` where a module's result shares memory with its argument, or with itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.injecting import inject, run


class Writes(nn.Module):
    """Works in place: whoever goes on with what it was given sees its result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.weight)


class Passes(Writes):
    """Gives what it is given, which is no writing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Shares(Writes):
    """Gives one tensor twice, a view of it, and a key that is a number."""

    def forward(self, x: torch.Tensor) -> Any:
        y = x * self.weight
        return {0: y, "again": (y, None), "view": y[:, 1:]}


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x + 1
        found = self.inner(given)
        if isinstance(found, dict):
            found[0] += 2
            total: torch.Tensor = given.sum() + found["again"][0].sum() + found["view"].sum()
            return total
        return given + 0 * found if isinstance(self.inner, Passes) else given * 2


@pytest.mark.parametrize("make", [Writes, Passes, Shares])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_shares_memory_goes_on_sharing_it(
    tmp_path: Path, make: Callable[[], Writes], mode: Callable[[], Any]
) -> None:
    right, wrong = Around(make()), Around(make())
    with torch.no_grad():
        wrong.get_parameter("inner.weight").mul_(3)
    with mode():
        good, results, _ = run(tmp_path, right)
        _, same, _ = run(tmp_path, right, inject=inject(good, "^inner$"))
        _, injected, remarks = run(tmp_path, wrong, inject=inject(good, "^inner$"))
        _, without, _ = run(tmp_path, wrong)
    assert remarks[0].startswith("inject: 1 results are those of") and len(remarks) == 1
    assert torch.equal(same[0], results[0]) and torch.equal(injected[0], results[0])
    assert torch.equal(without[0], results[0]) == (make is Passes)
