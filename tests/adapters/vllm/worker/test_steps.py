"""The bracket around a runner's methods and the rows it reads, on runners of the two known shapes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.sinks import MemorySink
from tlcore.adapters.vllm.worker.rows import RowError, RowReader, external_id
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.layout.rows import CallRows

PARALLEL = SimpleNamespace(parallel_config=SimpleNamespace(prefill_context_parallel_size=1))


def scheduled(**counts: int) -> Any:
    return SimpleNamespace(num_scheduled_tokens=counts, total_num_scheduled_tokens=sum(counts.values()))


class Runner:
    """A runner of the first version: what it holds after ``execute_model``, and one linear layer."""

    def __init__(self, final: bool = False) -> None:
        self.model = nn.Sequential(nn.Linear(2, 2))
        self.final = final
        self.vllm_config = PARALLEL
        self.input_batch = SimpleNamespace(req_ids=["b", "a"], num_computed_tokens_cpu=np.array([4, 0, 9]))
        self.query_start_loc = SimpleNamespace(np=np.array([0, 1, 4, 4]))
        self.positions = torch.tensor([4, 0, 1, 2, 0, 0])
        self.input: torch.Tensor | None = None
        self.fail: BaseException | None = None

    def _prepare_inputs(self, scheduler_output: Any, counts: Any) -> None:
        """Here the inputs are what they are from the beginning."""

    def _model_forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(input_ids)
        return output

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        with torch.no_grad():
            tokens = max(1, scheduler_output.total_num_scheduled_tokens)
            self._prepare_inputs(scheduler_output, None)
            given = torch.ones(tokens, 2) if self.input is None else self.input
            self._model_forward(given, positions=torch.zeros(len(given)))
        if self.fail is not None:
            raise self.fail
        return "final" if self.final else None

    def sample_tokens(self, grammar_output: Any) -> str:
        return "sampled"


def _bracketed(runner: Runner, sink: MemorySink) -> tuple[Session, StepWrapper]:
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused"})
    session = Session(config, new_run(config), sink, inline=True)
    session.attach(runner.model)
    return session, StepWrapper(session, runner)


def test_a_step_ends_with_its_sampling() -> None:
    runner, sink = Runner(), MemorySink()
    session, _ = _bracketed(runner, sink)
    assert runner.execute_model(scheduled(a=3, b=1)) is None
    assert sink.steps == []
    assert runner.sample_tokens(None) == "sampled"
    session.close()
    (step,) = sink.steps
    assert list(step.rows or ()) == [
        {"request_id": "b", "external_request_id": None, "first_row": 0, "rows": 1, "first_position": 4},
        {"request_id": "a", "external_request_id": None, "first_row": 1, "rows": 3, "first_position": 0},
    ]
    assert step.extra == {"call_rows": []}


@pytest.mark.parametrize(
    ("several", "found"),
    [({}, []), ({"uses_mrope": True}, [3]), ({"uses_mrope": True, "mrope_num_dims": 4}, [4])],
)
def test_a_step_says_whether_rows_come_first(several: dict[str, Any], found: list[int]) -> None:
    """Positions of several dimensions have theirs behind; of a draft model, too."""
    plain, model = SimpleNamespace(uses_mrope=False), SimpleNamespace(**{"uses_mrope": False, **several})
    for target, draft in ((plain, model), (model, plain), (model, None)):
        runner, sink = Runner(), MemorySink()
        speculative = SimpleNamespace(draft_model_config=draft)
        runner.vllm_config = SimpleNamespace(
            **vars(PARALLEL), model_config=target, speculative_config=speculative
        )
        session, _ = _bracketed(runner, sink)
        runner.execute_model(scheduled(a=3, b=1))
        runner.sample_tokens(None)
        session.close()
        assert sink.steps[0].extra["before_rows"] == found


def test_a_step_with_a_final_output_ends_at_once() -> None:
    runner, sink = Runner(final=True), MemorySink()
    session, _ = _bracketed(runner, sink)
    assert runner.execute_model(scheduled(a=3, b=1)) == "final"
    session.flush()
    assert [step.step for step in sink.steps] == [0]


def test_warm_up_dummies_and_empty_batches_are_no_steps() -> None:
    runner, sink = Runner(final=True), MemorySink()
    session, bracket = _bracketed(runner, sink)
    bracket.warm_up(lambda: runner.execute_model(scheduled(a=3, b=1)))()
    runner.execute_model(scheduled())
    session.close()
    assert sink.steps == []


def test_nothing_is_kept_of_requests_that_ended_with_the_engines_work() -> None:
    """vLLM tells of them in a step without tokens, and only there."""
    runner, sink = Runner(), MemorySink()
    session, bracket = _bracketed(runner, sink)
    for _ in range(3):
        step = scheduled(a=3, b=1)
        step.scheduled_new_reqs = [
            SimpleNamespace(
                req_id=name, num_computed_tokens=0, prompt_token_ids=[5, 6], sampling_params=object()
            )
            for name in ("a", "b")
        ]
        runner.execute_model(step)
        runner.sample_tokens(None)
        assert bracket._reader.asked("a") is not None and bracket._tokens.prompt("a") is not None
        idle = scheduled()
        idle.finished_req_ids = {"a", "b"}
        runner.execute_model(idle)
        assert not (bracket._reader._known or bracket._reader._asked or bracket._tokens._new)
        assert not bracket._choices._known
    session.close()
    assert len(sink.steps) == 3


def test_an_exception_ends_the_step_and_passes_unchanged() -> None:
    runner, sink = Runner(), MemorySink()
    session, _ = _bracketed(runner, sink)
    runner.fail = RuntimeError("the model broke")
    with pytest.raises(RuntimeError) as caught:
        runner.execute_model(scheduled(a=3, b=1))
    assert caught.value is runner.fail
    runner.fail = None
    runner.execute_model(scheduled(a=3, b=1))
    runner.sample_tokens(None)
    session.close()
    first, second = sink.steps
    assert first.extra["error"].endswith("RuntimeError")
    assert "error" not in second.extra


def test_a_fault_of_capture_never_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    session, _ = _bracketed(runner, MemorySink())
    for method in ("begin_step", "end_step"):
        monkeypatch.setattr(session, method, lambda *args, **kwargs: 1 / 0)
        runner.execute_model(scheduled(a=3, b=1))
        assert runner.sample_tokens(None) == "sampled"
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda runner: runner.positions.zero_(), "positions"),
        (lambda runner: runner.query_start_loc.np.__setitem__(1, 2), "query_start_loc"),
        (lambda runner: runner.input_batch.num_computed_tokens_cpu.fill(0), "computed tokens"),
        (lambda runner: delattr(runner, "positions"), "the model runner is unknown"),
        (lambda runner: setattr(runner.input_batch, "req_ids", ["a", "c"]), "the model runner is unknown"),
    ],
)
def test_rows_that_contradict_each_other_are_not_guessed(spoil: Any, reason: str) -> None:
    runner, sink = Runner(), MemorySink()
    session, _ = _bracketed(runner, sink)
    spoil(runner)
    runner.execute_model(scheduled(a=3, b=1))
    runner.sample_tokens(None)
    session.close()
    (step,) = sink.steps
    assert step.rows is None
    assert reason in step.extra["rows_unavailable"]


@pytest.mark.parametrize(
    ("counts", "drafts", "layers", "told"),
    [
        ({"a": 3, "b": 1}, {}, {"layers.2"}, False),
        ({"a": 3, "b": 1}, {}, None, False),
        ({"a": 3, "b": 1}, {}, set(), True),
        ({"a": 3, "b": 1}, {"a": [7, 8]}, {"layers.2"}, True),
        ({"a": 1, "b": 1}, {}, {"layers.2"}, True),
    ],
    ids=["a prompt", "the second runner's", "no layer", "drafts", "decoding"],
)
def test_positions_that_fast_prefill_skips_are_not_told(
    counts: dict[str, int], drafts: Any, layers: set[str] | None, told: bool
) -> None:
    """Behind the last layer they have what an earlier one made of them; what is sampled from is right."""
    runner, sink = Runner(), MemorySink()
    cache = SimpleNamespace(kv_sharing_fast_prefill=True)
    runner.vllm_config = SimpleNamespace(**vars(PARALLEL), cache_config=cache)
    if layers is not None:
        runner.kv_sharing_fast_prefill_eligible_layers = layers  # type: ignore[attr-defined]
    if drafts:
        runner.speculative_config = object()  # type: ignore[attr-defined]
    runner.query_start_loc.np[:3] = [0, counts["b"], counts["a"] + counts["b"]]
    session, _ = _bracketed(runner, sink)
    step = scheduled(**counts)
    step.scheduled_spec_decode_tokens = drafts
    runner.execute_model(step)
    runner.sample_tokens(None)
    session.close()
    found = {**sink.steps[0].extra, "rows": list(sink.steps[0].rows or ())}
    assert len(found["rows"]) == 2
    record = {"name": "step_0/0/outputs_cpu", "module": "0", "call": 0, "dtype": "float32"}
    spans = CallRows(found).spans({**record, "shape": [sum(counts.values()), 2]})
    assert [span.row["request_id"] for span in spans] == (["b", "a"] if told else [])


def test_what_came_from_the_cache_is_told_once_however_often_a_request_comes() -> None:
    reader = RowReader(Runner())
    for computed, ended in ((0, ()), (3, ()), (2, ("a",))):
        step = scheduled(a=3, b=1)
        step.finished_req_ids = ended
        step.scheduled_new_reqs = [
            SimpleNamespace(req_id="a", num_computed_tokens=computed, prompt_token_ids=[5, 6])
        ]
        reader.begin_step(step)
        (row,) = (each for each in reader.rows(step) if each["request_id"] == "a")
        assert row["cached"] == (2 if ended else 0)


@pytest.mark.parametrize("repeats", ["1", "0"])
def test_two_requests_of_one_id_are_not_told_as_one(repeats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", repeats)
    reader = RowReader(Runner())
    told: list[bool] = []
    for begins, ended in ((("a", "b"), ()), ((), ()), (("a",), ("a",)), ((), ()), (("c",), ("a",))):
        step = scheduled(a=3, b=1)
        step.finished_req_ids = ended
        step.scheduled_new_reqs = [
            SimpleNamespace(req_id=name, num_computed_tokens=0, prompt_token_ids=[5, 6]) for name in begins
        ]
        reader.begin_step(step)
        fails = len(told) in (2, 3) and repeats == "1"
        with pytest.raises(RowError, match="'a' was the id of another") if fails else nullcontext():
            reader.rows(step)
        told.append(fails)
    reader.forget()
    reader.begin_step(step)
    assert reader.rows(step)


class SecondRunner:
    """A runner of the second version: its batch is the return value of ``prepare_inputs``."""

    vllm_config = PARALLEL

    def prepare_inputs(self, request_tokens: int) -> Any:
        return SimpleNamespace(
            req_ids=["x-0123abcd", "y-0123abcd"],
            num_scheduled_tokens=np.array([1, request_tokens]),
            num_tokens=4,
            num_tokens_after_padding=8,
            query_start_loc_np=np.array([0, 1, 4, 4]),
            positions=torch.tensor([7, 2, 3, 4, 0, 0, 0, 0]),
        )


def test_rows_of_the_second_runner_come_from_its_batch() -> None:
    runner = SecondRunner()
    reader = RowReader(runner)
    with pytest.raises(RowError, match="no batch"):
        reader.rows(None)
    reader.prepared(runner.prepare_inputs(3))
    rows = reader.rows(None)
    found = [(row["external_request_id"], row["first_row"], row["first_position"]) for row in rows]
    assert found == [("x", 0, 7), ("y", 1, 2)]
    reader.prepared(runner.prepare_inputs(2))
    with pytest.raises(RowError, match="sum"):
        reader.rows(None)


@pytest.mark.parametrize(
    ("internal", "external"),
    [
        ("cmpl-AAA-0-a063df33", "cmpl-AAA-0"),
        ("0-a063df33", "0"),
        ("1_cmpl-AAA-a063df33", None),
        ("AAA", None),
    ],
)
def test_external_request_ids(internal: str, external: str | None) -> None:
    assert external_id(internal) == external
