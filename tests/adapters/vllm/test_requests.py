"""Requests in a busy engine: their joined rows are those of the same requests alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, all_stored, report
from tlcore.config.configuration import load_config
from tlcore.reader import Gap, Request, Run
from tlcore.runs.convert import convert

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "requests_script.py")
TOKENS = "model.embed_tokens/inputs_0_cpu"
# Products in bfloat16 are summed in another order for another batch, and the model has four layers.
TOLERANCE = 2**-5


@pytest.fixture(scope="module", params=["first", pytest.param("second", marks=pytest.mark.deep)])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory, runner = str(tmp_path_factory.mktemp("requests")), str(request.param)
    return report(SCRIPT, directory, runner, timeout=900, anew=runner == "second")


def _requests(said: dict[str, Any], name: str) -> list[Request]:
    run = tlcore.open_run(said[name]["url"])
    assert run.state == "complete" and all_stored(run.ledger)
    return [run.request(each) for each in said[name]["ids"]]


@pytest.fixture(scope="module")
def together(said: dict[str, Any]) -> list[Request]:
    return _requests(said, "together")


@pytest.fixture(scope="module")
def alone(said: dict[str, Any]) -> list[Request]:
    return _requests(said, "alone")


def _shared(said: dict[str, Any], one: str, other: str) -> list[int]:
    """For each request, how many tokens were the same in two runs: rounding may turn a later one."""
    return [
        next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
        for mine, theirs in zip(said[one]["fed"], said[other]["fed"], strict=True)
    ]


def _worst(one: Request, other: Request, shared: int) -> float:
    """The largest relative error of any row of any tensor in the first ``shared`` positions."""
    worst, compared = 0.0, 0
    for name in one.names:
        places = [{p: row for row, p in enumerate(each.positions(name))} for each in (one, other)]
        both = sorted(p for p in places[0].keys() & places[1].keys() if p < shared)
        a, b = (
            each[name][[own[p] for p in both]].float().reshape(len(both), -1)
            for each, own in zip((one, other), places, strict=True)
        )
        errors = (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-6)
        worst = max([worst, *errors.tolist()])
        compared += len(both)
    assert compared >= len(one.names) / 2
    return worst


def test_the_engine_mixed_and_chunked_and_preempted(said: dict[str, Any], together: list[Request]) -> None:
    run = tlcore.open_run(said["together"]["url"])
    steps = [run.step(number).rows or [] for number in run.steps]
    assert any({row["rows"] for row in rows} > {1} for rows in steps), "no step mixed prefill and decode"
    first = [row for rows in steps for row in rows if row["first_position"] == 0]
    lengths = {each.request_id: len(prompt) for each, prompt in zip(together, said["prompts"], strict=True)}
    assert any(row["rows"] < lengths[row["request_id"]] for row in first), "no prefill was chunked"
    assert any(each.recomputed(TOKENS) for each in together), "no request was preempted"
    assert max(len(rows) for rows in steps) > 4


def test_each_requests_tokens_are_its_own(said: dict[str, Any], together: list[Request]) -> None:
    for request, fed in zip(together, said["together"]["fed"], strict=True):
        assert request.positions(TOKENS) == list(range(len(fed)))
        assert request[TOKENS].tolist() == fed
        assert not request.gaps(TOKENS)


def test_token_ids_are_stored_whatever_was_cached_or_computed_again(said: dict[str, Any]) -> None:
    for name, prompts in (("together", said["prompts"]), ("again", [said["prompts"][said["longest"]]])):
        for request, fed, prompt in zip(_requests(said, name), said[name]["fed"], prompts, strict=True):
            assert request.token_ids.tolist() == fed and not request.tokens.rejected
            assert request.prompt_length == len(prompt)
            assert request.token_ids_of(TOKENS).tolist() == request[TOKENS].tolist()
    together = tlcore.open_run(said["together"]["url"])
    told = [entry for number in together.steps for entry in together.step(number).token_entries]
    assert sum(each["first_position"] == 0 for each in told) == len(said["prompts"])


def test_a_window_holds_the_rows_of_its_positions(said: dict[str, Any]) -> None:
    prompts = [said["prompts"][each] for each in said["window"]["asked"]]
    for request, fed, prompt in zip(_requests(said, "window"), said["window"]["fed"], prompts, strict=True):
        wanted = range(len(prompt) - 2, min(40, len(fed)))
        assert request.positions(TOKENS) == list(wanted)
        assert request[TOKENS].tolist() == [fed[position] for position in wanted]
        assert request.token_ids.tolist()[: len(prompt)] == prompt


def test_rows_are_those_of_the_request_alone(
    said: dict[str, Any], together: list[Request], alone: list[Request]
) -> None:
    assert len(together) == len(alone) == 32
    shared = _shared(said, "together", "alone")
    assert sum(shared) > 0.9 * sum(map(len, said["alone"]["fed"]))
    for one, other, count in zip(together, alone, shared, strict=True):
        assert set(one.names) == set(other.names) and len(one.names) > 15
        assert _worst(one, other, count) < TOLERANCE


def test_a_planted_permutation_is_found(said: dict[str, Any], alone: list[Request], tmp_path: Path) -> None:
    """Two requests that decode in one step are swapped in a copy's rows of that step, and only there."""
    # As files, in which a step's rows can be changed.
    original = tlcore.open_run(said["together"]["url"])
    copy = Path(convert(original, load_config(output_dir=str(tmp_path), backend="pt")))
    shared = dict(zip(said["together"]["ids"], _shared(said, "together", "alone"), strict=True))
    number, pair = _two_that_decode(tlcore.open_run(copy), shared)
    file = copy / f"step_{number}" / "step.json"
    document = json.loads(file.read_text())
    one, other = (document["rows"][place] for place in pair)
    one["first_row"], other["first_row"] = other["first_row"], one["first_row"]
    document["rows"].sort(key=lambda row: row["first_row"])
    file.write_text(json.dumps(document))
    by_id = dict(zip(said["together"]["ids"], alone, strict=True))
    for row in (one, other):
        permuted = tlcore.open_run(copy).request(row["request_id"])
        request = row["external_request_id"]
        assert _worst(permuted, by_id[request], shared[request]) > 4 * TOLERANCE


def _two_that_decode(run: Run, shared: dict[str, int]) -> tuple[int, Sequence[int]]:
    """A step, and the places of two of its requests that have one row each in it, of different tokens."""
    for number in run.steps:
        rows = run.step(number).rows or []
        fed = run.tensor(f"step_{number}/{TOKENS}").tolist()
        places = {
            fed[row["first_row"]]: place
            for place, row in enumerate(rows)
            if row["rows"] == 1 and row["first_position"] < shared[row["external_request_id"]]
        }
        if len(places) >= 2:
            return number, sorted(places.values())[:2]
    raise AssertionError("no step has two requests that decode")


def test_positions_from_the_prefix_cache_are_a_recorded_gap(said: dict[str, Any]) -> None:
    (first,) = _requests(said, "first")
    (again,) = _requests(said, "again")
    assert not first.gaps(TOKENS)
    (gap,) = again.gaps(TOKENS)
    assert gap == Gap(0, gap.end, "prefix cache") and gap.end % 32 == 0 and gap.end >= 32
    (shared,) = _shared(said, "first", "again")
    assert again.positions(TOKENS) == list(range(gap.end, len(said["again"]["fed"][0])))
    assert _worst(again, first, shared) < TOLERANCE


def test_parallel_samples_have_requests_of_their_own(said: dict[str, Any]) -> None:
    run = tlcore.open_run(said["samples"]["url"])
    for asked, prompt in zip(said["samples"]["ids"], (0, said["longest"]), strict=True):
        with pytest.raises(tlcore.ReadError, match="names 2 requests"):
            run.request(asked)
        samples = [run.request(asked, sample=n) for n in (0, 1)]
        known = said["prompts"][prompt]
        for each in samples:
            fed = dict(zip(each.positions(TOKENS), each[TOKENS].tolist(), strict=True))
            assert [fed.get(p, token) for p, token in enumerate(known)] == known
            assert max(fed) == len(known) + 1
        assert _worst(samples[0], samples[1], len(known)) < TOLERANCE
