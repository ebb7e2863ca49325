"""Which heads a rank has, where only their numbers tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlcore.adapters.vllm.worker.sharding import _held
from tlcore.errors import ReadError
from tlcore.reader.unshard import joined


def _joined(own: int, heads: Any, size: int, parts: list[list[int]]) -> list[int]:
    part = {**_held(own, heads, size), "tp_rank": 0, "tp_size": size}
    return [int(each) for each in joined(part, [torch.tensor([each]) for each in parts], "x")[0]]


def test_the_heads_of_ranks_are_put_side_by_side() -> None:
    assert _joined(2, 4, 2, [[1, 2], [3, 4]]) == [1, 2, 3, 4]
    # Fewer heads than ranks are held by several, and what all ranks have is whole.
    assert _joined(1, 2, 4, [[1], [1], [2], [2]]) == [1, 2]
    assert _joined(1, 1, 2, [[1], [1]]) == [1]
    assert _joined(4, 4, 2, [[1, 2, 3, 4]] * 2) == [1, 2, 3, 4]


@pytest.mark.parametrize("heads", [None, 6, 0])
def test_heads_that_nobody_knows_are_not_joined(heads: Any) -> None:
    with pytest.raises(ReadError, match="which heads of the model a rank has is not known"):
        _joined(2, heads, 2, [[1, 2], [3, 4]])
