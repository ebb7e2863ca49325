"""Where the shape of a tensor does not tell whether its first axis is that of a step's tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tlcore.adapters.vllm.worker.row_sets import token_set
from tlcore.adapters.vllm.worker.rows import RowReader
from tlcore.layout.rows import placed, row_set_of


class _OfTransformers(nn.Linear):
    __module__ = "vllm.model_executor.models.transformers.causal"


class _Derived(_OfTransformers):
    __module__ = "somebodys.model"


def _rows(*counts: int) -> list[dict[str, Any]]:
    firsts = [sum(counts[:place]) for place in range(len(counts))]
    return [
        {"request_id": str(place), "first_row": first, "rows": count, "first_position": 7 * place}
        for place, (first, count) in enumerate(zip(firsts, counts, strict=True))
    ]


@pytest.mark.parametrize("padded", [0, 2])
def test_planes_of_states_are_no_tokens_where_they_are_as_many(padded: int) -> None:
    """Gemma 3n has states of (planes, tokens, size): of four tokens nobody can tell (4, 4, size)."""
    for counts, known in (((1, 1, 1, 1), False), ((2, 2), False), ((3,), True), ((1, 1, 1, 1, 1), True)):
        tokens = sum(counts)
        found = token_set(_rows(*counts), padded, (4,))
        for length in found.lengths:
            assert row_set_of((4, length, 8), False, [found]) is None
            assert (row_set_of((length, 4, 8), False, [found]) is found) == (known or length != 4)
        assert row_set_of((tokens, 8), False, [found]) is found


def test_an_encoders_states_are_no_tokens_where_they_are_as_many() -> None:
    rows = _rows(3, 2)
    for encoded in (5, 6):
        found = token_set(rows, encoded=encoded)
        known = found if encoded != 5 else None
        assert row_set_of((5, 8), False, [found]) is known and row_set_of((5, 2, 4), False, [found]) is known


def test_where_transformers_runs_tokens_are_a_sample_and_planes_come_before_it() -> None:
    rows = _rows(2, 2)
    found = token_set(rows, 0, (4,), batched=True)
    assert placed((1, 4, 8), False, [found])[:2] == (found, 1)
    assert placed((4, 1, 4, 8), False, [found])[:2] == (None, 0)
    assert placed((1, 4, 2, 8), False, [token_set(rows, batched=False)]).rows is None


@pytest.mark.parametrize(
    ("part", "found"),
    [(nn.Linear, False), (_OfTransformers, True), (_Derived, True)],
    ids=["vLLM's own", "transformers'", "a class of one's own"],
)
@pytest.mark.parametrize("inner", [False, True])
def test_models_that_transformers_runs_are_known(part: type[nn.Module], found: bool, inner: bool) -> None:
    """Also as the language model of one that sees images."""
    model = nn.Sequential(part(1, 1)) if inner else part(1, 1)
    assert RowReader(SimpleNamespace(get_model=lambda: model)).batched is found
    assert not RowReader(SimpleNamespace()).batched


@pytest.mark.parametrize(("config", "planes"), [({"altup_num_inputs": 4}, (4,)), ({}, ()), (None, ())])
def test_planes_are_told_by_the_models_configuration(config: Any, planes: tuple[int, ...]) -> None:
    model = SimpleNamespace() if config is None else SimpleNamespace(hf_text_config=SimpleNamespace(**config))
    runner = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    assert RowReader(runner).planes == planes
