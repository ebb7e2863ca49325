"""Whose row is whose, held against transformers in float32, wherever vLLM's batches make it hard to tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.helpers import ENVIRONMENT, FORKED_RANKS, REPOSITORY, report
from tests.adapters.vllm.truth import (
    OF_TRANSFORMERS,
    OF_VLLM,
    STATES,
    Names,
    Truth,
    complaints,
    of_rank,
    wrong_rows,
)
from tests.compat.environments import arctic_inference
from tests.deep import scaled
from tlcore.errors import TlcoreError
from tlcore.reader import Run

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "rows_script.py")
DEEP = [
    "eagle-first", "dflash-first", "medusa-first", "mtp-first", "suffix-first", "custom_class-first",
    "extract_hidden_states-first", "adapters-first", "adapters_ngram-first", "adapters_compiled-first",
    "tensor-first", "pipeline-first",
    "chunks-second-transformers", "draft_model-first-transformers", "adapters-first-transformers",
    "tensor-first-transformers", "pipeline-first-transformers",
]  # fmt: skip
WAYS = [
    "ngram-first", "draft_model-first", "eagle3-first", "chunks-first", "data-first",
    "draft_model-second", "chunks-second", "chunks-first-transformers",
]  # fmt: skip
# Of the first runner's engines, that is 12 in short runs and 275 in full ones.
MIXES, PLANTED = scaled(3, 25), scaled(1, 3)


@pytest.fixture(scope="module", params=[*WAYS, *(pytest.param(way, marks=pytest.mark.deep) for way in DEEP)])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an engine captured, and the way it works."""
    way, runner, code = (*request.param.split("-"), "auto")[:3]
    counts = (MIXES, PLANTED) if runner == "first" and not way.startswith("adapters") else (0, 0)
    directory = str(tmp_path_factory.mktemp(request.param))
    environment = FORKED_RANKS if way in ("tensor", "pipeline", "data") else {}
    if way == "suffix":
        environment = {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{arctic_inference()}"}
    found = report(
        SCRIPT,
        directory,
        way,
        runner,
        *map(str, counts),
        code,
        timeout=scaled(600, 3000),
        environment=environment,
        anew=runner == "second",
    )
    names = OF_TRANSFORMERS if code == "transformers" else OF_VLLM
    return {**found, "way": way, "runner": runner, "truth": Truth(Path(found["model"]), names)}


def test_every_row_is_its_requests(captured: dict[str, Any]) -> None:
    for name in ("all", "last", "one"):
        run, found = tlcore.open_run(captured[name]["url"]), captured[name]
        run.verify()
        known = {str(row["request_id"]) for number in run.steps for row in run.step(number).samples}
        for place, (identity, tokens) in enumerate(zip(found["ids"], found["tokens"], strict=True)):
            if name == "one" and place != 1:
                assert not any(each.startswith(f"{identity}-") for each in known)
                continue
            whole = None if name == "last" else len(captured["prompts"][place])
            assert wrong_rows(run.request(identity), tokens, captured["truth"], whole) == []
        _check_steps(run, dict(zip(found["ids"], found["tokens"], strict=True)), captured["truth"].names)


def test_token_ids_and_windows_are_its_requests(captured: dict[str, Any]) -> None:
    for name in ("all", "response"):
        run, found = tlcore.open_run(captured[name]["url"]), captured[name]
        for place, (identity, tokens) in enumerate(zip(found["ids"], found["tokens"], strict=True)):
            request, prompt, end = run.request(identity), len(captured["prompts"][place]), len(tokens) - 1
            assert request.prompt_length == prompt and len(request.token_ids) in (end, end + 1)
            assert request.token_ids.tolist() == tokens[: len(request.token_ids)]
            hidden = of_rank(request, captured["truth"].names.hidden)
            rows = request.positions(hidden)
            assert request.token_ids_of(hidden).tolist() == [tokens[position] for position in rows]
            begin = prompt if name == "response" else 0
            assert min(rows, default=begin) == begin and set(range(begin, end)) <= set(rows)
            assert captured["truth"].agrees(request[hidden], tokens, rows, -1), (name, place)


def test_rows_of_rejected_tokens_are_stored_only_where_all_are(captured: dict[str, Any]) -> None:
    rejected = dict.fromkeys(("all", "last", "response"), 0)
    for name in rejected:
        run = tlcore.open_run(captured[name]["url"])
        for number in run.steps:
            step = run.step(number)
            for record in step.records:
                spans = step.row_spans(record)
                rejected[name] += sum(span.length - span.kept().length for span in spans)
                owners = [span.row["request_id"] for span in spans]
                if name == "last":
                    assert all(span.length == 1 for span in spans) and len(owners) == len(set(owners))
    if captured["way"] in ("ngram", "draft_model"):
        assert rejected["all"]
    assert not rejected["last"] and not rejected["response"], rejected


def _check_steps(run: Run, tokens: dict[str, list[int]], names: Names) -> None:
    """Hold the rows of each step alone against the answers: nothing later overwrites what was rejected."""
    for number in run.steps:
        step = run.step(number)
        embedding = [rank for rank in step.documents if _ids_of(names, number, rank) in step]
        assert embedding
        for rank in embedding:
            fed, rows = step[_ids_of(names, number, rank)].flatten().tolist(), step.documents[rank]["rows"]
            assert len(fed) == sum(row["rows"] for row in rows)
            for row in rows:
                true = tokens[str(row["request_id"]).rpartition("-")[0]][row["first_position"] :]
                got = fed[row["first_row"] : row["first_row"] + row["rows"]]
                both = list(zip(got, true, strict=False))
                kept = next((i for i, (mine, real) in enumerate(both) if mine != real), len(both))
                assert row.get("accepted", len(got)) == kept


def _ids_of(names: Names, number: int, rank: int) -> str:
    return f"step_{number}/{names.ids}" + (f"_rank_{rank}" if rank else "")


def test_each_of_several_engines_served_some(captured: dict[str, Any]) -> None:
    if captured["way"] != "data":
        pytest.skip("is one engine")
    for name in ("all", "last", "response"):
        run, found = tlcore.open_run(captured[name]["url"]), captured[name]
        hidden = captured["truth"].names.hidden
        assert {of_rank(run.request(each), hidden) for each in found["ids"]} == {hidden, f"{hidden}_rank_1"}


def test_a_draft_model_goes_by_names_of_its_own(captured: dict[str, Any]) -> None:
    if captured["way"] != "draft_model":
        pytest.skip("has no draft model of the target's kind")
    run = tlcore.open_run(captured["all"]["url"])
    for number in run.steps:
        calls = run.step(number).calls
        assert [call for call in calls if not call.startswith("draft.")] == [
            "model.embed_tokens", "model.layers.2", "model.norm", "logits_processor",
        ]  # fmt: skip
        assert "draft.model.layers.2_1" in calls and "draft.logits_processor" in calls


def test_a_speculators_rows_are_its_requests(captured: dict[str, Any]) -> None:
    """It works on tokens that stayed (or the one after each), and on the target's states of them."""
    if captured["way"] not in STATES or captured["runner"] != "first":
        pytest.skip("has no model whose rows are known")
    tail, ahead, part, layer = STATES[captured["way"]]
    for name in ("all", "last", "one"):
        run, found = tlcore.open_run(captured[name]["url"]), captured[name]
        for place, (identity, tokens) in enumerate(zip(found["ids"], found["tokens"], strict=True)):
            if name == "one" and place != 1:
                continue
            request = run.request(identity)
            ids = f"draft.{captured['truth'].names.ids}"
            if ids in request:
                fed = [tokens[position + ahead] for position in request.positions(ids)]
                assert request[ids].tolist() == fed
                # One that fills in blocks has only the token before each.
                assert name == "last" or captured["way"] == "dflash" or len(fed) >= len(tokens) - 2
            states = request[tail]
            states = states[:, 0] if states.ndim == 3 else states[:, part]
            assert captured["truth"].agrees(states, tokens, request.positions(tail), layer), (name, place)


def test_every_row_of_a_random_mix_is_its_requests(captured: dict[str, Any]) -> None:
    for mix in captured["mixes"]:
        if mix["plant"] is None:
            assert complaints(mix, captured["truth"]) == [], (mix["seed"], mix["keys"])


def test_faults_planted_in_a_mix_are_found(captured: dict[str, Any]) -> None:
    planted = [mix for mix in captured["mixes"] if mix["plant"] is not None and mix["changes"]]
    assert bool(planted) == bool(captured["mixes"])
    for mix in planted:
        try:
            told = bool(complaints(mix, captured["truth"]))
        except (ValueError, TlcoreError):
            # Rows that cannot be are refused by whoever reads them.
            told = True
        # Drafts that were all kept are right, whatever was believed of them.
        assert told or mix["plant"] == "believed", (mix["seed"], mix["plant"])


def test_adapters_of_one_prompt_are_told_apart(captured: dict[str, Any]) -> None:
    """Against the model that has them merged; the modules' names are those without adapters."""
    if "adapters" not in captured:
        pytest.skip("takes no adapters")
    found = captured["adapters"]
    run = tlcore.open_run(found["url"])
    assert run.step(0).calls == tlcore.open_run(captured["all"]["url"]).step(0).calls
    truths = {name: Truth(Path(path)) for name, path in found["merged"].items()}
    names = {
        row["external_request_id"]: row["adapter"]
        for number in run.steps
        for row in run.step(number).rows or ()
    }
    data = run.dataset(captured["truth"].names.layer, per="request")
    assert dict(zip(data.requests, data.adapters, strict=True)) == {
        each: run.request(each).adapter for each in data.requests
    }
    assert sorted(map(str, data.adapters)) == sorted(names.values())
    hashes = {row["prompt_hash"] for number in run.steps for row in run.step(number).rows or ()}
    assert len(hashes) == len(found["requests"])
    for each in found["requests"]:
        assert names[each["id"]] == each["name"]
        for name, truth in truths.items():
            agrees = wrong_rows(run.request(each["id"]), each["tokens"], truth) == []
            assert agrees == (name == each["name"]), (each, name)
