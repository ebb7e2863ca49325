"""Which call of its module a call is, where a step has calls for other requests, too, or for items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.fuzz.mixes import Asked, Model, Runner
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

LOGITS = "logits_processor_1/outputs_cpu"


class _SeesItems(Model):
    """Has one activation for its encoder and its decoder, as vLLM's models of one activation do."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()
        self.decoder = nn.Sequential(self.act)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(self.decoder(rows))


class _Runner(Runner):
    """Encodes the items of a step by a call of its own for each, as vLLM does where they differ in size."""

    def __init__(self, encoder_decoder: bool) -> None:
        super().__init__(speculates=False, batched=False)
        self.model = _SeesItems()
        model = SimpleNamespace(uses_mrope=False, is_encoder_decoder=encoder_decoder)
        self.vllm_config = SimpleNamespace(**vars(self.vllm_config), model_config=model)
        self.items: dict[str, torch.Tensor] = {}

    @contextmanager
    def timed_encoder_operation(self, time: bool, refs: Any, first: int, count: int) -> Iterator[None]:
        yield

    def _preprocess(self, scheduled: Any) -> None:
        refs = [
            (each.name, SimpleNamespace(offset=0, length=len(self.items[each.name]), is_embed=None))
            for each in scheduled.batch
            if each.name in self.items
        ]
        act: Any = self.model.act
        for place, (name, _) in enumerate(refs):
            with self.timed_encoder_operation(False, refs, place, 1):
                act(self.items[name])
        self.items = {}

    def execute_model(self, scheduled: Any) -> None:
        for each in scheduled.batch:
            self.requests.setdefault(each.name, SimpleNamespace(mm_features=[]))
        super().execute_model(scheduled)


def _scheduled(batch: Sequence[Asked], counts: Sequence[int]) -> Any:
    return SimpleNamespace(
        batch=batch,
        num_scheduled_tokens={each.name: count for each, count in zip(batch, counts, strict=True)},
        total_num_scheduled_tokens=sum(counts),
        scheduled_spec_decode_tokens={},
        padded=0,
    )


def _captured(path: Path, runner: Runner, steps: Sequence[tuple[Sequence[Asked], Sequence[int]]]) -> str:
    config = load_config({"log_step_ids": [], "output_dir": str(path), "backend": "safetensors"})
    session = Session(config, new_run(config), inline=True)
    session.attach(runner.model)
    StepWrapper(session, runner)
    for batch, counts in steps:
        ends = [each.computed + count for each, count in zip(batch, counts, strict=True)]
        cut = [end < each.prompt for each, end in zip(batch, ends, strict=True)]
        vars(runner)["discard_request_mask"] = SimpleNamespace(np=cut)
        runner.execute_model(_scheduled(batch, counts))
        runner.sampled = {}
        runner.sample_tokens(None)
        for each, count in zip(batch, counts, strict=True):
            each.computed += count
    session.close()
    return session.url


def _asked(number: int, length: int, logprobs: bool = True) -> Asked:
    return Asked(number, [10 * number + place for place in range(length)], length, 1, logprobs)


@pytest.fixture
def both(tmp_path: Path) -> list[str]:
    """Runs of the same requests, whose chunks share other steps, in another order."""
    runs = []
    for steps in (
        (((0, 5), (1, 2)), ((1, 3), (2, 4))),
        (((2, 4), (1, 3), (0, 2)), ((0, 3), (1, 2))),
    ):
        known = {number: _asked(number, length) for number, length in enumerate((5, 5, 4))}
        chunks = [([known[number] for number, _ in step], [count for _, count in step]) for step in steps]
        runs.append(_captured(tmp_path, Runner(speculates=False, batched=False), chunks))
    return runs


def test_the_logits_of_a_prompt_have_one_name_whoever_shares_its_steps(both: list[str]) -> None:
    for url in both:
        run = tlcore.open_run(url)
        for number, length in enumerate((5, 5, 4)):
            request = run.request(str(number))
            logits = [name for name in request if "logits_processor" in name and "/outputs" in name]
            assert sorted(logits) == ["logits_processor/outputs_cpu", LOGITS]
            assert request.positions(LOGITS) == list(range(length - 1))
            expected = [[number, place, 10 * number + place] for place in range(length - 1)]
            assert request[LOGITS].tolist() == expected


def test_runs_whose_requests_share_other_steps_are_equal(both: list[str]) -> None:
    result = tlcore.compare(*both)
    assert result.equal, str(result)


def test_what_an_encoder_has_is_never_compared_with_rows_of_the_prompt(tmp_path: Path) -> None:
    """One module works on both, and of the tokens' rows another run has those behind its prefix cache."""
    runs = []
    for value, cached in ((7.0, 0), (7.0, 2), (8.0, 2)):
        runner = _Runner(encoder_decoder=False)
        asked = _asked(0, 4, False)
        runner.items, asked.computed = {asked.name: torch.full((2, 3), value)}, cached
        runs.append(_captured(tmp_path, runner, [([asked], [4 - cached])]))
        request = tlcore.open_run(runs[-1]).request("0")
        assert request.positions("act/outputs_cpu") == list(range(cached, 4))
        assert request["act/outputs_cpu@encoder"].tolist() == [[value] * 3] * 2
    result = tlcore.compare(runs[0], runs[1], ignore_missing=True)
    assert result.equal, str(result)
    other = tlcore.compare(runs[1], runs[2], ignore_missing=True).first_divergence
    assert other is not None and other.module == "act"


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_what_an_encoder_calls_is_no_call_of_the_models_pass(encoder_decoder: bool, tmp_path: Path) -> None:
    runner = _Runner(encoder_decoder)
    first, second = _asked(0, 3, False), _asked(1, 4, False)
    runner.items = {
        each.name: torch.full((2 + each.number, 3), 7.0 + each.number) for each in (first, second)
    }
    for each in (first, second):
        each.tokens.append(99)
    url = _captured(tmp_path, runner, [([first, second], [3, 4]), ([second, first], [1, 1])])
    run = tlcore.open_run(url)
    for each in (first, second):
        request = run.request(str(each.number))
        expected = [[each.number, place, token] for place, token in enumerate(each.tokens)]
        assert request["act/outputs_cpu"].tolist() == expected
        items = request["act/outputs_cpu@encoder"]
        assert items.tolist() == [[7.0 + each.number] * 3] * (2 + each.number)
        assert request["layer/outputs_cpu"].tolist() == expected
        names = [name for name in request if name.startswith("act") and "outputs" in name]
        assert len(names) == 2, names
