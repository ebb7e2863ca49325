"""Injecting into engines of half precision, with the prefix cache on, and what another dtype computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report

pytestmark = [pytest.mark.slow, pytest.mark.deep]
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "inject_dtypes_script.py")
MODULES = ("model.layers.1", "model.norm")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an engine of float32 gave."""
    found = report(SCRIPT, str(tmp_path_factory.mktemp("full")), "float32", timeout=600)
    return {"dtype": torch.float32, **found}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def said(
    request: pytest.FixtureRequest, full: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    found = report(SCRIPT, str(directory), request.param, full["right"]["url"], timeout=600)
    return {"dtype": getattr(torch, request.param), **found}


def _told(url: str) -> tuple[int, Counter[str], Counter[str]]:
    """How many rows were injected, how many not for which reason, how many rounded from what to what."""
    run, rows = tlcore.open_run(url), 0
    left_out, rounded = Counter[str](), Counter[str]()
    for number in run.steps:
        told = run.step(number).documents[0]["injected"]
        rows += told["rows"]
        left_out.update(told["left_out"])
        rounded.update(told.get("rounded", {}))
    return rows, left_out, rounded


def test_its_own_results_are_injected_bit_for_bit(said: dict[str, Any]) -> None:
    for name in ("same", "again"):
        compared = tlcore.compare(said["right"]["url"], said[name]["url"])
        assert compared.equal and compared.counts["bitwise"] == len(compared.results) > 500
        assert said[name]["tokens"] == said["right"]["tokens"]
        rows, left_out, rounded = _told(said[name]["url"])
        assert rows > 1000 and not left_out and not rounded
    run = tlcore.open_run(said["same"]["url"])
    assert run.tensor("step_0/model.layers.1/outputs_0_cpu").dtype == said["dtype"]


def test_injected_requests_neither_fill_nor_read_the_prefix_cache(said: dict[str, Any]) -> None:
    cached = tlcore.open_run(said["cached"]["url"])
    # What the engine had computed itself before is still what others find there.
    assert [row["cached"] for row in cached.step(0).rows or []] == [32, 0, 64]
    for name in ("same", "parted", "again"):
        run = tlcore.open_run(said[name]["url"])
        assert all(not row.get("cached") for each in run.steps for row in run.step(each).rows or [])


def test_requests_are_injected_as_far_as_their_tokens_are_the_other_ones(said: dict[str, Any]) -> None:
    rows, left_out, _ = _told(said["parted"]["url"])
    # Five tokens behind each prompt were computed; of the first request all of them are others.
    assert rows == len(MODULES) * (40 + 9 + 70 + 2 * 5)
    assert left_out == {
        "its tokens are others than in the other run": len(MODULES),
        "a position before it was not injected, was cached, or was not in a captured step": len(MODULES) * 4,
        "no request of the other run, or no other one, has its prompt": len(MODULES) * (71 + 41 + 2 * 5),
    }
    right, parted = (tlcore.open_run(said[name]["url"]) for name in ("right", "parted"))
    for mine, theirs in zip(right.requests, parted.requests, strict=False):
        one, other = right.request(mine), parted.request(theirs)
        for name in (f"{module}/outputs_0_cpu" for module in MODULES):
            same = 40 if one.tokens.prompt_length == 40 else len(one[name])
            assert torch.equal(one[name][:same], other[name][:same])


def test_what_another_dtype_computed_is_said_to_be_rounded(
    said: dict[str, Any], full: dict[str, Any]
) -> None:
    rows, _, rounded = _told(said["other"]["url"])
    name = str(said["dtype"]).removeprefix("torch.")
    assert rounded == {f"float32 to {name}": rows} and rows >= len(MODULES) * (40 + 9 + 70)
    right, other = tlcore.open_run(full["right"]["url"]), tlcore.open_run(said["other"]["url"])
    for mine, theirs in zip(right.requests, other.requests, strict=True):
        one, two = (
            run.request(each)["model.norm/outputs_0_cpu"] for run, each in ((right, mine), (other, theirs))
        )
        prompt = right.request(mine).tokens.prompt_length
        assert torch.equal(one[:prompt].to(said["dtype"]), two[:prompt])
