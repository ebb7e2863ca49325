"""Injecting one run's results into another of the same engine: by request and position, and no others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "inject_script.py")
WAYS = [
    ("plain", "first"),
    ("crowded", "first"),
    ("drafts", "first"),
    pytest.param(("crowded", "second"), marks=pytest.mark.deep),
    pytest.param(("drafts", "second"), marks=pytest.mark.deep),
    pytest.param(("transformers", "first"), marks=pytest.mark.deep),
]


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    way, runner = request.param
    directory = str(tmp_path_factory.mktemp("inject"))
    return report(SCRIPT, directory, way, runner, timeout=1200, anew=runner == "second")


def _told(run: Any) -> tuple[int, Counter[str]]:
    """How many rows a run's steps say were injected, and how many not for which reason."""
    rows, left_out = 0, Counter[str]()
    for number in run.steps:
        told = run.step(number).documents[0]["injected"]
        rows += told["rows"]
        left_out.update(told["left_out"])
    return rows, left_out


def _first(one: dict[str, Any], other: dict[str, Any]) -> Any:
    return tlcore.compare(one["url"], other["url"]).first_divergence


def test_where_nothing_differs_nothing_changes(said: dict[str, Any]) -> None:
    compared = tlcore.compare(said["right"]["url"], said["same"]["url"])
    assert compared.equal and compared.counts["bitwise"] == len(compared.results) > 500
    assert said["same"]["tokens"] == said["right"]["tokens"]
    assert _told(tlcore.open_run(said["same"]["url"]))[0] > 1000


def test_of_two_faults_the_second_is_found_next_and_then_none(said: dict[str, Any]) -> None:
    faulty, other = (f"model.layers.{layer}" for layer in said["layers"])
    assert _first(said["right"], said["wrong"]).module.startswith(faulty)
    modules = r"layers\.\d+$"
    once = tlcore.compare(said["right"]["url"], said["once"]["url"], modules=modules).first_divergence
    assert once is not None and once.module == other
    both = tlcore.compare(said["right"]["url"], said["both"]["url"], modules=modules)
    assert both.counts["different"] == both.counts["close"] == 0 and both.counts["bitwise"] > 50
    assert any("B was injected" in note for note in both.notes)
    assert said["both"]["tokens"][: len(said["right"]["tokens"])] == said["right"]["tokens"]


def test_each_row_of_an_injected_module_is_that_of_the_other_run(said: dict[str, Any]) -> None:
    right, both = tlcore.open_run(said["right"]["url"]), tlcore.open_run(said["both"]["url"])
    ids = list(right.requests), list(both.requests)
    for mine, theirs in zip(*ids, strict=False):
        one, other = right.request(mine), both.request(theirs)
        for layer in said["layers"]:
            (name, *_) = (each for each in one if each.startswith(f"model.layers.{layer}/outputs"))
            assert one.positions(name) == other.positions(name) == list(range(len(one.positions(name))))
            assert torch.equal(one[name], other[name])


def test_what_is_not_injected_is_counted(said: dict[str, Any]) -> None:
    both = tlcore.open_run(said["both"]["url"])
    rows, left_out = _told(both)
    computed = sum(row["rows"] for number in both.steps for row in both.step(number).rows or [])
    assert rows + sum(left_out.values()) == 2 * computed
    (lonely,) = {str(each) for each in both.requests} - {
        str(each) for each in list(both.requests)[: len(said["right"]["tokens"])]
    }
    own = sum(
        row["rows"]
        for number in both.steps
        for row in both.step(number).rows or []
        if row["request_id"] == lonely
    )
    assert left_out["no request of the other run, or no other one, has its prompt"] == 2 * own > 0
    late = tlcore.open_run(said["late"]["url"])
    assert _told(late)[0] == 0 and "not in a captured step" in next(iter(_told(late)[1]))


def test_the_prefix_cache_of_others_is_not_poisoned(said: dict[str, Any]) -> None:
    assert said["after"] == [said["wrong"]["tokens"]] * 2
    for name in ("both", "same", "once"):
        run = tlcore.open_run(said[name]["url"])
        assert all(not row.get("cached") for each in run.steps for row in run.step(each).rows or [])


def test_the_run_is_marked_and_operators_are_heard_beside(said: dict[str, Any]) -> None:
    run = tlcore.open_run(said["injected_ops"]["url"])
    assert run.injected is not None and run.injected["modules"] == said["modules"][:1]
    assert run.injected["run_id"] == Path(said["right"]["url"]).name
    assert _told(run)[0] > 0
    calls = [run.step(0).call(each) for each in run.step(0).calls if "layers.1." in each]
    assert any(call.operators_shown for call in calls)
