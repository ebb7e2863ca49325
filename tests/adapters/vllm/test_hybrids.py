"""Rows of models that keep states instead of attending, or have planes of states, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, all_stored, report
from tests.adapters.vllm.hybrids import KINDS, PLANES
from tests.adapters.vllm.hybrids_script import CHOSEN
from tlcore.reader import Request, Run

pytestmark = [pytest.mark.slow, pytest.mark.deep]
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "hybrids_script.py")
_NORMS = ("norm", "norm_f", "final_layernorm")


@pytest.fixture(scope="module", params=KINDS)
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = report(SCRIPT, str(tmp_path_factory.mktemp(request.param)), request.param, timeout=900)
    return {**found, "kind": request.param}


def test_answers_and_ledger(said: dict[str, Any]) -> None:
    assert said["all"]["answers"] == said["one"]["answers"] == said["plain"]
    for name in ("all", "one"):
        run = tlcore.open_run(said[name]["url"])
        assert (
            run.state == "complete" and run.ledger.balanced and run.ledger.failed == run.ledger.dropped == 0
        )
        assert run.verify() == run.ledger.stored > 0
    assert all_stored(tlcore.open_run(said["all"]["url"]).ledger)


def test_every_row_is_its_requests(said: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(said["model"], dtype=torch.float32)
    for name in ("all", "one"):
        run = tlcore.open_run(said[name]["url"])
        for place, identity in enumerate(said[name]["ids"]):
            if name == "all" or place == CHOSEN:
                prompt, answer = said["prompts"][place], said[name]["answers"][place]
                _check(run.request(identity), model, prompt, answer)
    assert len(run.requests) == 1


def _check(request: Request, model: Any, prompt: list[int], answer: list[int]) -> None:
    fed = [*prompt, *answer[:-1]]
    with torch.inference_mode():
        states = model.base_model(torch.tensor([fed])).last_hidden_state[0]
        logits = model(torch.tensor([fed])).logits[0]
    ids = _named(request, ("embed_tokens", "embeddings"), "inputs")
    assert request.positions(ids) == list(range(len(fed))) and request[ids].tolist() == fed
    assert request.token_ids.tolist() == fed
    norm = _named(request, _NORMS, "outputs")
    assert request.positions(norm) == list(range(len(fed)))
    torch.testing.assert_close(request[norm], states, atol=3e-3, rtol=3e-2)
    own = _named(request, ("logits_processor",), "outputs")
    positions = request.positions(own)
    assert set(range(len(prompt) - 1, len(fed))) <= set(positions)
    torch.testing.assert_close(request[own], logits[positions], atol=5e-3, rtol=5e-2)


def _named(request: Request, modules: tuple[str, ...], direction: str) -> str:
    """The outermost tensor of a module that has one of these names."""
    found = [
        name
        for name in request
        if name.split("/")[0].rsplit(".", 1)[-1] in modules and f"/{direction}" in name
    ]
    return min(found, key=lambda name: name.count("."))


def test_planes_are_nobodys(said: dict[str, Any]) -> None:
    """Also where a step has as many tokens: four requests of one each."""
    if said["kind"] != "gemma3n":
        pytest.skip("has one plane of states")
    run = tlcore.open_run(said["all"]["url"])
    layers = [
        (step.record(name)["shape"], list(step.row_spans(step.record(name))))
        for step in map(run.step, run.steps)
        for name in step.names
        if name.endswith("layers.1/outputs_cpu")
    ]
    assert [PLANES, PLANES, 128] in [shape for shape, _ in layers]
    assert not any(spans for _, spans in layers)
    chosen = tlcore.open_run(said["one"]["url"])
    assert not any("layers.1/outputs" in name for name in _all_names(chosen))


def test_of_a_chosen_request_nothing_of_others_is_stored(said: dict[str, Any]) -> None:
    everything = tlcore.open_run(said["all"]["url"])
    by_owner = [_distinct(everything.request(each)) for each in said["all"]["ids"]]
    others = set().union(*(rows for place, rows in enumerate(by_owner) if place != CHOSEN))
    others -= by_owner[CHOSEN]
    chosen = tlcore.open_run(said["one"]["url"])
    stored = {
        row for step in map(chosen.step, chosen.steps) for name in step.names for row in _rows(step[name])
    }
    assert stored and not stored & others


def _all_names(run: Run) -> set[str]:
    return {name for number in run.steps for name in run.step(number).names}


def _distinct(request: Request) -> set[bytes]:
    return {row for name in request for row in _rows(request[name])}


def _rows(tensor: torch.Tensor) -> set[bytes]:
    """The rows that say something: of more than a few numbers, of which not all are alike."""
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
    return {row.numpy().tobytes() for row in rows if row.numel() > 16 and row.unique().numel() > 2}
