"""Token ids and windows on runners of the known shapes: what is stored, of whom, and how often."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.adapters.vllm.worker.test_steps import PARALLEL, Runner
from tests.sinks import MemorySink
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.adapters.vllm.worker.tokens import Prompt, TokenReader, _entries_of
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.layout.drafts import Decided, accept
from tlcore.layout.tokens import stored_entries

PROMPTS = {"a": [10, 11, 12, 13, 14], "b": [20, 21]}
# What the model is given: of b position 4, of a positions 0 to 2; then one of b and the rest of a's prompt.
STEPS = [({"a": 3, "b": 1}, [4, 0, 1, 2], [90, 10, 11, 12]), ({"a": 2, "b": 1}, [5, 3, 4], [91, 13, 14])]


class TokenRunner(Runner):
    """A runner of the first version that is given token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.input_ids = SimpleNamespace(gpu=torch.zeros(8, dtype=torch.int32))
        self.model_config = SimpleNamespace(enable_prompt_embeds=False)
        self.requests = {
            "b": SimpleNamespace(prompt_token_ids=PROMPTS["b"], prompt_embeds=None, num_prompt_tokens=2)
        }

    def prepare(self, step: int, new: bool = True) -> Any:
        """The batch of a step, as the scheduler says it."""
        counts, positions, ids = STEPS[step]
        self.positions = torch.tensor(positions)
        self.input_ids.gpu[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self.input = torch.arange(2.0 * len(ids)).view(-1, 2) + 100 * step
        self.query_start_loc.np = np.array([0, 1, len(ids), len(ids)])
        self.input_batch.num_computed_tokens_cpu = np.array([positions[0], positions[1], 9])
        a = SimpleNamespace(
            req_id="a", prompt_token_ids=PROMPTS["a"], num_computed_tokens=0, prompt_embeds=None
        )
        cached = {"b": positions[0]} if step == 0 else {"b": positions[0], "a": positions[1]}
        return SimpleNamespace(
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            scheduled_new_reqs=[a] if step == 0 and new else [],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(cached), num_computed_tokens=list(cached.values())
            ),
            finished_req_ids=set(),
            scheduled_spec_decode_tokens={},
        )


def _run(runner: TokenRunner, sink: MemorySink, writes: bool = True, **keys: Any) -> list[Any]:
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused", **keys})
    session = Session(config, new_run(config), sink, inline=True)
    session.attach(runner.model)
    StepWrapper(session, runner, writes_tokens=writes)
    for step in range(2):
        runner.execute_model(runner.prepare(step))
        runner.sample_tokens(None)
    session.close()
    assert session.ledger.balanced
    return [step.extra.get("tokens") for step in sink.steps]


def _entry(request: str, prompt: int, first: int, ids: list[int]) -> dict[str, Any]:
    return {"request_id": request, "prompt": prompt, "first_position": first, "ids": ids}


def test_a_prompt_is_told_once_and_what_is_generated_as_it_comes() -> None:
    b = [_entry("b", 2, 0, [20, 21]), _entry("b", 2, 4, [90])]
    first, second = _run(TokenRunner(), MemorySink())
    assert first == [*b, _entry("a", 5, 0, PROMPTS["a"])]
    assert second == [_entry("b", 2, 5, [91])]


@pytest.mark.parametrize("keys", [{"log_token_ids": False}, {"capture": "stats"}, {"writes": False}], ids=str)
def test_ids_are_not_stored_where_they_are_not_to_be(keys: dict[str, Any]) -> None:
    assert _run(TokenRunner(), MemorySink(), **keys) == [None, None]


def test_only_chosen_requests_ids_are_stored() -> None:
    first, second = _run(TokenRunner(), MemorySink(), request_ids="a")
    assert first == [_entry("a", 5, 0, PROMPTS["a"])] and second is None


def test_a_prompt_that_the_model_was_not_given_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    runner = TokenRunner()
    original = runner.prepare

    def other(step: int) -> Any:
        scheduled = original(step)
        runner.input_ids.gpu[2] = 99
        return scheduled

    runner.prepare = other  # type: ignore[method-assign, assignment]
    first, _ = _run(runner, MemorySink())
    assert {each["request_id"] for each in first} == {"b"}
    assert "not given the prompt of a" in caplog.text


def test_embeddings_are_no_token_ids() -> None:
    runner = TokenRunner()
    runner.model_config.enable_prompt_embeds = True
    runner.requests["b"].prompt_embeds = torch.ones(2, 4)
    runner.is_token_ids = SimpleNamespace(np=np.array([True, True, True, True]))  # type: ignore[attr-defined]
    first, _ = _run(runner, MemorySink())
    assert first[0] == _entry("b", 2, 4, [90])


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ("prompt", [[("a", 0, 3)], [("a", 3, 2)]]),
        ("response", [[("b", 4, 1)], [("b", 5, 1)]]),
        ({"from": -1, "to": "prompt"}, [[("a", 4, 1)]]),
        ({"from": 2, "to": 5}, [[("b", 4, 1), ("a", 2, 1)], [("a", 3, 2)]]),
        ({"from": 6}, []),
    ],
    ids=str,
)
def test_windows_cut_the_rows_and_steps_without_any_are_left_out(rows: Any, kept: list[Any]) -> None:
    runner, sink = TokenRunner(), MemorySink()
    _run(runner, sink, rows=rows)
    found = [
        [(row["request_id"], row["first_position"], row["rows"]) for row in step.rows or ()]
        for step in sink.steps
    ]
    assert found == kept
    for step in sink.steps:
        _, positions, _ = STEPS[step.step]
        whole = (torch.arange(2.0 * len(positions)).view(-1, 2) + 100 * step.step).tolist()
        places = {("b" if i == 0 else "a", position): i for i, position in enumerate(positions)}
        expected = [
            whole[places[row["request_id"], row["first_position"] + i]]
            for row in step.rows or ()
            for i in range(row["rows"])
        ]
        assert sink.tensors[f"step_{step.step}/0/inputs_0_cpu"].tolist() == expected


def test_where_the_prompts_end_is_not_known_nothing_is_in_a_window() -> None:
    runner, sink = TokenRunner(), MemorySink()
    runner.requests.clear()
    _run(runner, sink, rows="response")
    assert all(not step.rows for step in sink.steps)
    assert all(len(tensor) == 0 for tensor in sink.tensors.values())


class _Second:
    """What the second model runner holds of a request that began before the capture, and its batch."""

    vllm_config = PARALLEL
    req_states = SimpleNamespace(req_id_to_index={"x": 1}, prompt_len=SimpleNamespace(np=np.array([9, 3])))
    batch = SimpleNamespace(input_ids=torch.tensor([5, 6, 7, 0], dtype=torch.int32))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_of_the_second_runner_the_ids_are_those_of_its_batch(kept: int) -> None:
    reader = TokenReader(_Second(), True)
    row = {"request_id": "x", "first_row": 0, "rows": 3, "first_position": 2, "drafts": 2}
    tell = reader.take([row], _Second.batch, None)
    assert tell is not None
    entries = tell()
    accept(entries, {}, {"x": Decided(kept, kept + 1)})
    (entry,) = stored_entries(entries)
    assert entry == {**_entry("x", 3, 2, [5, 6, 7]), "accepted": 1 + kept}


def test_a_model_of_another_kind_takes_no_harm() -> None:
    assert TokenReader(nn.Linear(1, 1), True).take([], None, None) is None


def test_requests_that_go_on_are_told_as_all_others_are() -> None:
    """Where flags say of every id that it is one, the same is said in the way that knows of embeddings."""
    chance = random.Random(0)
    for _ in range(300):
        parts: list[Any] = []
        ids: list[int] = []
        for request in "abcd"[: chance.randint(1, 4)]:
            count, length, first = chance.randint(1, 4), chance.randint(1, 6), chance.randint(0, 6)
            own = [chance.choice((7, 8, 9, -1)) for _ in range(count)]
            known = [None, Prompt(length, None), Prompt(length, [7] * length)]
            row = {"request_id": request, "first_row": len(ids), "rows": count, "first_position": first}
            if chance.random() < 0.3:
                row["drafts"] = chance.randint(0, count - 1)
            parts.append((row, chance.choice(known), chance.random() < 0.3))
            ids += own
        numbers = np.array(ids, np.int64)
        flags = np.ones(len(ids), bool)
        assert list(_entries_of(parts, numbers, None, False)) == list(
            _entries_of(parts, numbers, flags, True)
        )
