"""What injection hears of a runner's steps: which requests begin and end, and what passes it by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tlcore
from tests.adapters.vllm.worker.test_steps import Runner, scheduled
from tlcore.adapters.vllm.salts import keep_apart
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session


class Engine:
    """Runs one request at a time, called ``a``, whose model adds ``fault`` to what it is given."""

    def __init__(self, output_dir: Path, fault: float, **keys: Any) -> None:
        config = load_config(output_dir=str(output_dir), log_step_ids=[], module_call_match="^0$", **keys)
        self.session = Session(config, new_run(config), of_requests=True)
        self.runner: Any = Runner()
        layer = torch.nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(2))
            layer.bias.fill_(fault)
        self.runner.model = torch.nn.Sequential(layer)
        self.session.attach(self.runner.model)
        self.bracket = StepWrapper(self.session, self.runner)

    def step(self, first: int, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[float]:
        """What the layer gives for these tokens; with a ``prompt`` they are the first of a new request."""
        step, count = scheduled(a=len(tokens)), len(tokens)
        if prompt:
            request = SimpleNamespace(cache_salt=None, sampling_params=None, pooling_params=None)
            keep_apart(request)
            new = {"req_id": "a", "num_computed_tokens": 0, "prompt_token_ids": list(prompt)}
            step.scheduled_new_reqs = [SimpleNamespace(**new, cache_salt=request.cache_salt)]
        runner = self.runner
        runner.input_batch = SimpleNamespace(req_ids=["a"], num_computed_tokens_cpu=np.array([first]))
        runner.query_start_loc = SimpleNamespace(np=np.array([0, count]))
        runner.positions = torch.arange(first, first + count)
        runner.input_ids = torch.tensor(tokens)
        runner.input = torch.tensor(tokens)[:, None].float().expand(-1, 2)
        found: list[list[float]] = []
        hook = runner.model.register_forward_hook(lambda _, given, output: found.extend(output.tolist()))
        runner.execute_model(step)
        runner.sample_tokens(None)
        hook.remove()
        return [each[0] for each in found]

    def ends(self) -> None:
        """The request has ended, and nothing else is there to do."""
        idle = scheduled()
        idle.finished_req_ids = {"a"}
        self.runner.execute_model(idle)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Another one than that of the run which it injects, whose request was 5 6 7 | 8."""
    right = Engine(tmp_path / "right", 0.0)
    assert right.step(0, [5, 6, 7], prompt=[5, 6, 7]) == [5, 6, 7] and right.step(3, [8]) == [8]
    right.session.close()
    inject = {"run": right.session.url, "modules": ["^0$"]}
    found = Engine(tmp_path / "wrong", 100.0, inject=inject)
    yield found
    found.session.close()


def test_a_request_is_injected_from_its_first_step_on(engine: Engine) -> None:
    assert engine.step(0, [5, 6, 7], prompt=[5, 6, 7]) == [5, 6, 7]
    assert engine.step(3, [8]) == [8]


def test_another_request_with_the_id_of_one_that_ended_last_is_another(engine: Engine) -> None:
    assert engine.step(0, [5, 6, 7], prompt=[5, 6, 7]) == [5, 6, 7]
    engine.ends()
    assert engine.step(0, [9, 6, 7], prompt=[9, 6, 7]) == [109, 106, 107]


def test_a_step_that_ran_compiled_was_not_injected_and_ends_it(engine: Engine) -> None:
    eager: Any = SimpleNamespace(step=nullcontext, ran=False)
    engine.bracket.eager = eager
    engine.step(0, [5, 6, 7], prompt=[5, 6, 7])
    eager.ran = True
    assert engine.step(3, [8]) == [108]
    engine.session.close()
    told = tlcore.open_run(engine.session.url).step(1).documents[0]["injected"]
    assert told["left_out"] == {"a step of it was not captured": 1}
