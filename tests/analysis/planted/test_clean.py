"""No divergence is reported between runs that differ in nothing but batches, kernels or compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

import tlcore
from tests.deep import scaled

from .runs import captured, compiled
from .subjects import SUBJECTS

# Whole models, many times.
pytestmark = pytest.mark.slow
Run = Callable[..., str]
SEEDS = scaled(1, 25)
BATCHES = [(2, 5, (3, 4)), (3, 6, (2, 7)), (5, 2, (4, 8))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return partial(captured, str(tmp_path_factory.mktemp("clean")))


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_other_batches_are_no_divergence(subject: str, seed: int, run: Run) -> None:
    a, b, further = BATCHES[seed % len(BATCHES)]
    runs = {each: run(subject, each, seed) for each in (a, b, *further)}
    found = tlcore.compare(runs[a], runs[b], noise=[runs[each] for each in further])
    assert found.first_divergence is None, str(found)
    # They are not equal bit by bit: there was something to be told from a fault.
    assert found.first_difference is not None


def attention_of(kernels: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for each in (model, *model.modules()):
            if hasattr(each, "set_attn_implementation"):
                each.set_attn_implementation(kernels)

    return change


@pytest.mark.parametrize("subject", ["llama", "llama-bfloat16", "mixtral", "gpt2", "bert"])
def test_another_attention_kernel_is_no_divergence(subject: str, run: Run) -> None:
    eager = attention_of("eager")
    a, b = run(subject, 2), run(subject, 5, change=eager)
    further = [run(subject, each, change=eager) for each in (3, 4)]
    found = tlcore.compare(a, b, noise=further, ignore_missing=True)
    assert found.first_divergence is None, str(found)
    assert found.first_difference is not None


@pytest.mark.deep
@pytest.mark.parametrize("subject", ["llama", "gpt2", "adapted"])
def test_a_compiled_model_is_no_divergence(subject: str, run: Run, tmp_path: Any) -> None:
    a, b, *further = run(subject, 2), *(compiled(str(tmp_path), subject, each) for each in (5, 3, 4))
    found = tlcore.compare(a, b, noise=further, ignore_missing=True)
    assert found.first_divergence is None, str(found)
    assert isinstance(SUBJECTS[subject].prepare(), nn.Module)
