"""Rows of models that vLLM runs by transformers' code, compiled and padded, against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, all_stored, report
from tests.adapters.vllm.of_transformers import KINDS
from tests.adapters.vllm.of_transformers_script import PADDED
from tests.adapters.vllm.seen_by_transformers import ASKED, SeenTruth
from tests.adapters.vllm.seen_by_transformers_script import CHOSEN
from tests.adapters.vllm.truth import Names, Truth, wrong_rows
from tests.analysis.selftest.planting import ROWS, TENSORS, rewritten
from tlcore.reader import Run
from tlcore.runs.export.export import export

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "of_transformers_script.py")
SEEN_SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "seen_by_transformers_script.py")
NAMES = {
    "gpt_neox": Names("model.embed_in/inputs_0_cpu", "model.final_layer_norm/outputs_cpu"),
    "olmo2": Names("model.embed_tokens/inputs_0_cpu", "model.norm/outputs_cpu"),
}
LAYERS = ["model.layers.0/outputs", "model.layers.1/outputs"]


class Said:
    """What an engine answered and captured, and what is right."""

    def __init__(self, directory: Path, kind: str) -> None:
        # vLLM's setting for tests: traced as ever, but not compiled to machine code.
        found = report(SCRIPT, str(directory), kind, environment={"VLLM_CPU_CI_ENV": "1"})
        self.run = tlcore.open_run(found["url"])
        self.truth = Truth(Path(found["model"]), NAMES[kind])
        self.prompts: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        for identity, prompt, answer in zip(found["ids"], found["prompts"], found["answers"], strict=True):
            self.prompts[identity], self.tokens[identity] = len(prompt), prompt + answer

    def layers(self, identity: str) -> torch.Tensor:
        """What two layers handed on at each position: ``[positions, layers, size]``."""
        states, _ = self.truth.of(self.tokens[identity][:-1])
        return torch.stack(states[1 : 1 + len(LAYERS)], 1)

    def wrong_layers(self, run: Run) -> list[str]:
        """The requests of which some layer's rows are not those."""
        return [each for each in self.tokens if not _are_right(run, each, self.layers(each))]


def _are_right(run: Run, identity: str, true: torch.Tensor) -> bool:
    request = run.request(identity)
    names = [f"{name}_cpu" for name in LAYERS]
    if any(request.positions(name) != list(range(len(true))) for name in names):
        return False
    return torch.allclose(torch.stack([request[name] for name in names], 1), true, atol=2e-4, rtol=2e-3)


@pytest.fixture(
    scope="module",
    params=[kind if kind == "gpt_neox" else pytest.param(kind, marks=pytest.mark.deep) for kind in KINDS],
)
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Said:
    return Said(tmp_path_factory.mktemp(request.param), request.param)


def test_every_row_is_its_requests(said: Said) -> None:
    assert all_stored(said.run.ledger) and said.run.verify() > 0
    for identity, tokens in said.tokens.items():
        request = said.run.request(identity)
        assert wrong_rows(request, tokens, said.truth, said.prompts[identity]) == []
        assert request.token_ids.tolist() == tokens[:-1]
    assert said.wrong_layers(said.run) == []


def test_of_a_padded_step_of_one_token_a_single_row_is_the_requests(said: Said) -> None:
    alone = [step for step in map(said.run.step, said.run.steps) if step.documents[0]["rows"][0]["rows"] == 1]
    alone = [step for step in alone if len(step.rows or ()) == 1]
    assert alone and all(step.documents[0]["padded_rows"] == PADDED - 1 for step in alone)
    for step in alone:
        name = f"step_{step.number}/{said.truth.names.hidden}"
        assert step[name].shape == (1, PADDED, 128)
        (span,) = step.row_spans(step.record(name))
        assert (span.begin, span.length, span.axis) == (0, 1, 1)


def test_all_tensors_that_have_a_row_for_each_token_are_told(said: Said) -> None:
    """Those of transformers' modules, those of vLLM's attention in them, and those at either end."""
    for step in map(said.run.step, said.run.steps):
        owners = [row["request_id"] for row in step.rows or ()]
        for record in step.records:
            spans = step.row_spans(record)
            assert [span.row["request_id"] for span in spans] == owners, record["name"]
            of_transformers = record["module"].startswith("model") and not record["module"].endswith(".attn")
            assert {span.axis for span in spans} == {int(of_transformers)}, record["name"]


# One of them is in a layer that these models have not.
@pytest.mark.parametrize("fault", [*(name for name in TENSORS if name != "overwritten"), *ROWS])
def test_a_planted_fault_is_found(said: Said, fault: str, tmp_path: Path) -> None:
    planted: dict[str, Any] = {"rows": ROWS[fault]} if fault in ROWS else {"change": TENSORS[fault]}
    assert said.wrong_layers(rewritten(said.run, tmp_path, **planted))


def test_a_data_set_and_an_export_have_these_rows(said: Said, tmp_path: Path) -> None:
    data = said.run.dataset(LAYERS, per="request")
    assert len(data) == len(said.tokens)
    for place, identity in enumerate(data.requests):
        true = said.layers(identity.rpartition("-")[0])
        item = data[place]
        rows = torch.stack([item[name] for name in LAYERS], 1)
        torch.testing.assert_close(rows, true, atol=2e-4, rtol=2e-3)
    export(said.run, tmp_path / "out", "requests", LAYERS)
    written = [load_file(each) for each in sorted((tmp_path / "out" / "hidden_states").iterdir())]
    ids = [each["token_ids"].tolist() for each in written]
    assert sorted(ids) == sorted(tokens[:-1] for tokens in said.tokens.values())
    known = {tuple(tokens[:-1]): identity for identity, tokens in said.tokens.items()}
    for each in written:
        true = said.layers(known[tuple(each["token_ids"].tolist())])
        torch.testing.assert_close(each["hidden_states"], true, atol=2e-4, rtol=2e-3)


@pytest.mark.deep
def test_rows_of_a_model_that_sees_images_are_its_requests(tmp_path: Path) -> None:
    """Behind the axis of one sample in its language model, and an image's in front in its encoder."""
    found = report(SEEN_SCRIPT, str(tmp_path))
    truth = SeenTruth(Path(found["model"]))
    for name in ("all", "one"):
        run = tlcore.open_run(found[name]["url"])
        chosen = range(len(ASKED)) if name == "all" else [CHOSEN]
        assert len(run.requests) == len(chosen)
        for place in chosen:
            request, tokens = run.request(found[name]["ids"][place]), found[name]["tokens"][place][:-1]
            states = truth.of(tokens, ASKED[place][1])
            wanted = {"layers.0": states[1], "layers.1": states[2], "norm": states[-1]}
            for module, true in wanted.items():
                rows = f"model.language_model.{module}/outputs_cpu"
                assert request.positions(rows) == list(range(len(tokens)))
                torch.testing.assert_close(request[rows], true, atol=2e-4, rtol=2e-3)
        owners = [
            str(span.row["request_id"]).rpartition("-")[0]
            for step in map(run.step, run.steps)
            for record in step.records
            if record["module"] == "model.vision_tower" and record["direction"] == "inputs"
            for span in step.row_spans(record)
        ]
        # An image is encoded once, for the first who shows it.
        assert owners == [found[name]["ids"][place] for place in (0, 2, 2) if place in chosen]
