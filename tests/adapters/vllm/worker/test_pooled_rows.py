"""Which row of a request it is that a pooler has made of it, and what only tells where in a batch it lies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.fuzz.mixes import Runner
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session


class CLSPool(nn.Module):
    """Takes of each request its first row, by the name of vLLM's own."""

    def forward(self, hidden: torch.Tensor, **places: torch.Tensor) -> torch.Tensor:
        return hidden[places["first_token_indices_gpu"]]


class LastPool(CLSPool):
    """Takes of each request its last row."""

    def forward(self, hidden: torch.Tensor, **places: torch.Tensor) -> torch.Tensor:
        return hidden[places["last_token_indices_gpu"]]


class _Scores(LastPool):
    """Gives each request a vector of its own, as vLLM's poolers do."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def forward(self, hidden: torch.Tensor, **places: torch.Tensor) -> Any:
        return [self._scale * row for row in super().forward(hidden, **places)]


class _Poolers(nn.Module):
    """Has one for each task."""

    def __init__(self, **poolers: nn.Module) -> None:
        super().__init__()
        self.poolers_by_task = poolers

    def forward(self, hidden: torch.Tensor, **places: torch.Tensor) -> Any:
        return self.poolers_by_task["classify"](hidden, **places)


class _Tokens(nn.Module):
    """Is given what earlier steps left of each request, as vLLM's poolers of all tokens are."""

    def forward(self, hidden: torch.Tensor, left: list[list[torch.Tensor]]) -> torch.Tensor:
        return hidden


class _Runner(Runner):
    def __init__(self, pooler: nn.Module, task: str) -> None:
        super().__init__(speculates=False, batched=False)
        self.model.pooler = pooler
        self._task = task
        self._left: dict[str, Any] = {}

    def _pool(self, hidden: torch.Tensor) -> None:
        batch, counts = self.input_batch, self.query_start_loc.np
        starts = torch.as_tensor(counts)
        places = {"first_token_indices_gpu": starts[:-1], "last_token_indices_gpu": starts[1:] - 1}
        pooler: Any = self.model.pooler
        if self._task != "token_embed":
            pooler(hidden, **places)
            return
        pooler(hidden, [list(batch.pooling_states[name].hidden_states_cache) for name in batch.req_ids])
        for place, name in enumerate(batch.req_ids):
            batch.pooling_states[name].hidden_states_cache.append(hidden[counts[place] : counts[place + 1]])

    def sample_tokens(self, grammar: Any) -> Any:
        names = self.input_batch.req_ids
        self.input_batch.pooling_params = dict.fromkeys(names, SimpleNamespace(task=self._task))
        for name in names:
            self._left.setdefault(name, SimpleNamespace(hidden_states_cache=[]))
        self.input_batch.pooling_states = {name: self._left[name] for name in names}
        self._pool(self.hidden)


def _session(path: Path, pooler: nn.Module, task: str) -> tuple[_Runner, Session]:
    runner = _Runner(pooler, task)
    config = load_config({"log_step_ids": [], "output_dir": str(path), "module_call_match": "pooler"})
    session = Session(config, new_run(config), inline=True)
    session.attach(runner.model)
    StepWrapper(session, runner)
    return runner, session


def _step(runner: _Runner, parts: dict[int, tuple[int, int]]) -> None:
    """Of each request's tokens those from the first number to the second."""
    batch = [
        SimpleNamespace(
            name=f"{number}-0123abcd", number=number, computed=begin, tokens=list(range(end)), drafts=[],
            prompt=end, longest=1, logprobs=False,
        )
        for number, (begin, end) in parts.items()
    ]  # fmt: skip
    counts = {each.name: each.prompt - each.computed for each in batch}
    runner.execute_model(
        SimpleNamespace(
            batch=batch,
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            scheduled_spec_decode_tokens={},
            padded=0,
        )
    )
    runner.sample_tokens(None)


def _captured(path: Path, pooler: nn.Module, lengths: dict[int, int]) -> str:
    runner, session = _session(path, pooler, "classify")
    _step(runner, {number: (0, length) for number, length in lengths.items()})
    session.close()
    return session.url


@pytest.mark.parametrize(
    ("pooler", "position"),
    [
        (CLSPool(), 0),
        (LastPool(), 3),
        (_Poolers(classify=CLSPool(), embed=LastPool()), 0),
        (_Poolers(classify=LastPool(), embed=CLSPool()), 3),
    ],
    ids=["first", "last", "first for this task", "last for this task"],
)
def test_a_pooled_row_is_told_by_its_own_position(pooler: nn.Module, position: int, tmp_path: Path) -> None:
    request = tlcore.open_run(_captured(tmp_path, pooler, {0: 2, 1: 4})).request("1")
    names = [each for each in request if each.endswith("outputs_cpu")]
    inner = "pooler.poolers_by_task.classify/outputs_cpu"
    assert names == ([inner, "pooler/outputs_cpu"] if isinstance(pooler, _Poolers) else names[:1])
    for name in names:
        assert request.positions(name) == [position]
        assert request[name].tolist() == [[1.0, position, position]]


def test_where_a_request_lies_in_a_batch_is_no_difference_between_runs(tmp_path: Path) -> None:
    one, other = (_captured(tmp_path, CLSPool(), lengths) for lengths in ({0: 2, 1: 4}, {1: 4, 0: 2}))
    result = tlcore.compare(one, other)
    assert result.equal, str(result)
    other = _captured(tmp_path, LastPool(), {0: 2, 1: 4})
    assert not tlcore.compare(one, other).equal


def test_what_each_request_is_given_is_compared_whatever_shares_its_batch(tmp_path: Path) -> None:
    one = _captured(tmp_path, _Scores(1.0), {0: 2, 1: 4})
    same = _captured(tmp_path, _Scores(1.0), {1: 4, 0: 2})
    result = tlcore.compare(one, same)
    scores = [each for each in result.results if each.direction == "outputs"]
    assert result.equal and len(scores) == 2 and all(each.status == "bitwise" for each in scores), str(result)
    other = _captured(tmp_path, _Scores(2.0), {1: 4, 0: 2})
    found = tlcore.compare(one, other).first_divergence
    assert found is not None and (found.module, found.direction) == ("pooler", "outputs")


def test_rows_that_earlier_steps_left_of_a_prompt_are_none_of_the_step(tmp_path: Path) -> None:
    """A chunk of a prompt before has as many rows as this step: whose these are is not told."""
    runner, session = _session(tmp_path, _Tokens(), "token_embed")
    for parts in ({0: (0, 4)}, {0: (4, 7), 1: (0, 1)}, {1: (1, 4)}, {1: (4, 6)}):
        _step(runner, parts)
    session.close()
    run = tlcore.open_run(session.url)
    wrong = [
        (record["name"], span.row["request_id"])
        for step in map(run.step, run.steps)
        for record in step.records
        for span in step.row_spans(record)
        if span.first is not None
        and any(
            row[:2] != [int(span.row["request_id"].partition("-")[0]), position]
            for position, row in enumerate(
                step[record["name"]][span.begin : span.begin + span.length].tolist(), span.first
            )
        )
    ]
    assert wrong == []
    request = run.request("1")
    assert request.positions("pooler/inputs_0_cpu") == [1, 2, 3, 4, 5]
