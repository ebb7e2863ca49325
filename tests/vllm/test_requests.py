"""Requests in a busy engine: their joined rows are those of the same requests alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tlcore
from tests.vllm.helpers import REPOSITORY, report
from tlcore.reader import Gap, Request, Run

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "vllm" / "requests_script.py")
TOKENS = "model.embed_tokens/inputs_0_cpu"
# Products in bfloat16 are summed in another order for another batch, and the model has four layers.
TOLERANCE = 2**-5


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report(SCRIPT, str(tmp_path_factory.mktemp("requests")), timeout=400)


def _requests(said: dict[str, Any], name: str) -> list[Request]:
    run = tlcore.open_run(said[name]["url"])
    assert run.state == "complete" and run.ledger.stored == run.ledger.captured
    return [run.request(each) for each in said[name]["ids"]]


@pytest.fixture(scope="module")
def together(said: dict[str, Any]) -> list[Request]:
    return _requests(said, "together")


@pytest.fixture(scope="module")
def alone(said: dict[str, Any]) -> list[Request]:
    return _requests(said, "alone")


def _shared(one: Request, other: Request, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of both at the same positions, as far as both were fed the same tokens."""
    fed = [dict(zip(each.positions(TOKENS), each[TOKENS].tolist(), strict=True)) for each in (one, other)]
    same = next((p for p in sorted(fed[0]) if fed[1].get(p) != fed[0][p]), len(fed[0]))
    both = [p for p in one.positions(name) if p < same and p in set(other.positions(name))]
    a, b = ([each.positions(name).index(p) for p in both] for each in (one, other))
    return one[name][a].float(), other[name][b].float()


def _worst(one: Request, other: Request) -> float:
    """The largest relative error of any row of any tensor."""
    worst = 0.0
    for name in one.names:
        a, b = _shared(one, other, name)
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        errors = (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-6)
        worst = max(worst, float(errors.max()) if len(errors) else 0.0)
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
    for request, prompt in zip(together, said["prompts"], strict=True):
        assert request.positions(TOKENS) == list(range(len(request[TOKENS])))
        assert request[TOKENS][: len(prompt)].tolist() == prompt
        assert not request.gaps(TOKENS)


def test_rows_are_those_of_the_request_alone(together: list[Request], alone: list[Request]) -> None:
    assert len(together) == len(alone) == 32
    for one, other in zip(together, alone, strict=True):
        assert set(one.names) == set(other.names) and len(one.names) > 15
        a, _ = _shared(one, other, "model.layers.3/outputs_0_cpu")
        assert len(a) >= len(one[TOKENS]) // 2
        assert _worst(one, other) < TOLERANCE


def test_a_planted_permutation_is_found(said: dict[str, Any], alone: list[Request]) -> None:
    """Two requests that decode in one step are swapped in its rows, and only there."""
    run = tlcore.open_run(said["together"]["url"])
    number, pair = _two_that_decode(run)
    document = run.step(number).documents[0]
    one, other = (document["rows"][place] for place in pair)
    one["first_row"], other["first_row"] = other["first_row"], one["first_row"]
    document["rows"].sort(key=lambda row: row["first_row"])
    by_id = dict(zip(said["together"]["ids"], alone, strict=True))
    for row in (one, other):
        permuted = run.request(row["request_id"])
        sound = by_id[row["external_request_id"]]
        name = "model.layers.3/outputs_0_cpu"
        position = row["first_position"]
        a = permuted[name][permuted.positions(name).index(position)].float()
        b = sound[name][sound.positions(name).index(position)].float()
        assert float((a - b).norm() / b.norm()) > 4 * TOLERANCE


def _two_that_decode(run: Run) -> tuple[int, Sequence[int]]:
    """A step, and the places of two of its requests that have one row each in it and none recomputed."""
    for number in run.steps:
        rows = run.step(number).rows or []
        places = [place for place, row in enumerate(rows) if row["rows"] == 1]
        if len(places) >= 2:
            return number, places[:2]
    raise AssertionError("no step has two requests that decode")


def test_positions_from_the_prefix_cache_are_a_recorded_gap(said: dict[str, Any]) -> None:
    (first,) = _requests(said, "first")
    (again,) = _requests(said, "again")
    assert not first.gaps(TOKENS)
    (gap,) = again.gaps(TOKENS)
    assert gap == Gap(0, gap.end, "prefix cache") and gap.end % 32 == 0 and gap.end >= 32
    assert again.positions(TOKENS) == list(range(gap.end, len(first[TOKENS])))
    assert _worst(again, first) < TOLERANCE


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
        assert _worst(*samples) < TOLERANCE
