"""Whose row is whose, held against transformers in float32, wherever vLLM's batches make it hard to tell."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report
from tests.models import tiny_llama
from tlcore.reader import Request, Run

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "rows_script.py")
IDS, HIDDEN = "model.embed_tokens/inputs_0_cpu", "model.norm/outputs_0_cpu"
LOGITS = "logits_processor/outputs_cpu"
WAYS = ["ngram-first", "draft-first", "chunks-first", "async-first", "draft-second", "chunks-second"]


@cache
def _reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(tiny_llama()), dtype=torch.float32)


def _truth(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states and the logits of every position."""
    with torch.inference_mode():
        found = _reference()(torch.tensor([tokens]), output_hidden_states=True)
    return found.hidden_states[-1][0], found.logits[0]


def _check(request: Request, tail: str, tokens: list[int], of: torch.Tensor) -> list[int]:
    """Hold each row of a tensor against the truth at its position; the positions."""
    positions = request.positions(tail)
    assert positions == sorted(set(positions)) and positions[-1] < len(tokens)
    torch.testing.assert_close(request[tail], of[positions], atol=2e-4, rtol=2e-3)
    return positions


@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_its_requests(way: str, tmp_path: Path) -> None:
    way, runner = way.split("-")
    captured = report(SCRIPT, str(tmp_path), way, runner)
    for name in ("all", "last", "one"):
        run, found = tlcore.open_run(captured[name]["url"]), captured[name]
        run.verify()
        known = {str(row["request_id"]) for number in run.steps for row in run.step(number).rows or ()}
        for place, (identity, tokens) in enumerate(zip(found["ids"], found["tokens"], strict=True)):
            if name == "one" and place != 1:
                assert not any(each.startswith(f"{identity}-") for each in known)
                continue
            request = run.request(identity)
            hidden, logits = _truth(tokens)
            prompt, end = len(captured["prompts"][place]), len(tokens) - 1
            assert request[IDS].tolist() == [tokens[position] for position in request.positions(IDS)]
            rows = _check(request, HIDDEN, tokens, hidden)
            sampled = _check(request, LOGITS, tokens, logits)
            if name != "last":
                assert set(range(prompt - 1, end)) <= set(sampled)
                assert rows == request.positions(IDS) == list(range(len(rows))) and len(rows) >= end
            for tail in request:
                if tail.startswith("logits_processor_") and tail.endswith("outputs_cpu"):
                    assert set(_check(request, tail, tokens, logits)) <= set(range(prompt - 1))
        _check_steps(run, dict(zip(found["ids"], found["tokens"], strict=True)))
    if way == "draft":
        _check_draft(tlcore.open_run(captured["all"]["url"]))


def _check_steps(run: Run, tokens: dict[str, list[int]]) -> None:
    """Hold the rows of each step alone against the answers: nothing later overwrites what was rejected."""
    for number in run.steps:
        step = run.step(number)
        fed = step[f"step_{number}/{IDS}"].tolist()
        assert len(fed) == sum(row["rows"] for row in step.rows or ())
        for row in step.rows or ():
            true = tokens[str(row["request_id"]).rpartition("-")[0]][row["first_position"] :]
            got = fed[row["first_row"] : row["first_row"] + row["rows"]]
            both = list(zip(got, true, strict=False))
            kept = next((i for i, (mine, real) in enumerate(both) if mine != real), len(both))
            assert row.get("accepted", len(got)) == kept


def _check_draft(run: Run) -> None:
    """The draft model goes by names of its own, and leaves the target's calls as they are."""
    for number in run.steps:
        calls = run.step(number).calls
        assert [call for call in calls if not call.startswith("draft.")] == [
            "model.embed_tokens", "model.layers.2", "model.norm", "logits_processor",
        ]  # fmt: skip
        assert "draft.model.layers.2_1" in calls and "draft.logits_processor" in calls
