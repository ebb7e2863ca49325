"""Injecting into engines of two ranks, tensor and pipeline parallel: into all of them, or into none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, SEVERAL_RANKS, report

pytestmark = [pytest.mark.slow, pytest.mark.deep]
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "inject_ranks_script.py")
FAULTY = [f"model.layers.{layer}.post_attention_layernorm" for layer in (1, 2)]


ENGINES = [
    ("tensor", "float32"), ("pipeline", "float32"), ("tensor", "bfloat16"), ("tensor", "float16"),
]  # fmt: skip


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kind, dtype = request.param
    directory = tmp_path_factory.mktemp("inject")
    found = report(SCRIPT, str(directory), kind, dtype, timeout=900, environment=SEVERAL_RANKS)
    return {"kind": kind, **found}


def _told(run: Any, rank: int) -> tuple[int, Counter[str]]:
    """How many rows a rank says were injected, and how many not for which reason."""
    rows, left_out = 0, Counter[str]()
    for number in run.steps:
        told = run.step(number).documents[rank]["injected"]
        rows += told["rows"]
        left_out.update(told["left_out"])
    return rows, left_out


def _computed(run: Any, request: Any = None) -> int:
    rows = [row for number in run.steps for row in run.step(number).rows or []]
    return sum(row["rows"] for row in rows if request in (None, row["request_id"]))


def test_where_nothing_differs_nothing_changes(said: dict[str, Any]) -> None:
    compared = tlcore.compare(said["right"]["url"], said["same"]["url"])
    assert compared.equal and compared.counts["bitwise"] == len(compared.results) > 300
    run = tlcore.open_run(said["same"]["url"])
    assert all(_told(run, rank)[0] > 500 for rank in (0, 1))


def test_of_two_faults_the_second_is_found_next_and_then_none(said: dict[str, Any]) -> None:
    for name, module in (("wrong", FAULTY[0]), ("once", FAULTY[1])):
        first = tlcore.compare(said["right"]["url"], said[name]["url"]).first_divergence
        assert first is not None and first.module == module
    both = tlcore.compare(said["right"]["url"], said["both"]["url"])
    assert both.equal and both.counts["bitwise"] == len(both.results) > 300
    assert said["both"]["tokens"] == said["right"]["tokens"] != said["wrong"]["tokens"]


def test_every_rank_injects_each_row_of_its_modules(said: dict[str, Any]) -> None:
    run = tlcore.open_run(said["both"]["url"])
    # Each tensor-parallel rank has both modules, each pipeline stage one.
    modules = 2 if said["kind"] == "tensor" else 1
    for rank in (0, 1):
        assert _told(run, rank) == (modules * _computed(run), Counter())


def test_a_prompt_that_goes_on_otherwise_is_counted_on_every_rank(said: dict[str, Any]) -> None:
    right, more = tlcore.open_run(said["right"]["url"]), tlcore.open_run(said["more"]["url"])
    *paired, lonely = more.requests
    modules = 2 if said["kind"] == "tensor" else 1
    why = "no request of the other run, or no other one, has its prompt"
    for rank in (0, 1):
        rows, left_out = _told(more, rank)
        assert left_out == {why: modules * _computed(more, lonely)}
        assert rows == modules * (_computed(more) - _computed(more, lonely)) > 0
    for mine, theirs in zip(right.requests, paired, strict=True):
        one, other = right.request(mine), more.request(theirs)
        names = [name for name in one.names if "/outputs" in name and name.startswith(tuple(FAULTY))]
        # The norm and the sum behind it, of each rank that has them.
        assert len(names) == 2 * 2 * modules
        for name in names:
            assert one.positions(name) == other.positions(name) == list(range(len(one.positions(name))))
            assert torch.equal(one[name], other[name])
