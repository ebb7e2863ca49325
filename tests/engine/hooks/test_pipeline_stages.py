"""Stages of a pipeline (torch.distributed.pipelining), which run once more to learn shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore

dist = torch.distributed
pipelining = pytest.importorskip("torch.distributed.pipelining")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("keys", [{}, {"step": "outermost"}, {"log_step_ids": [1]}])
def test_what_learns_shapes_is_no_step(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    stage = pipelining.PipelineStage(model, 0, 1, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(stage, n_microbatches=2)
    called: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args: called.append(args[0].detach().clone()))
    x = torch.arange(16.0).reshape(4, 4)
    with tlcore.capture(model, **{"log_step_ids": [], "output_dir": tmp_path, **keys}) as captured:
        schedule.step(x)
    # The first microbatch's shapes are asked for by running it.
    assert len(called) == 3
    run = tlcore.open_run(captured.url)
    given = {number: run.step(number).call("").inputs.args[0] for number in run.steps}
    expected = dict(enumerate(x.chunk(2)))
    assert given.keys() == set(keys.get("log_step_ids", expected))
    assert all(torch.equal(given[number], expected[number]) for number in given)
    assert any(
        "calls of" in remark and "within a pipeline stage's inference of shapes are not captured" in remark
        for remark in run.remarks
    )


def test_a_stage_that_is_called_by_its_schedule_alone_is_a_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    stage = pipelining.PipelineStage(model, 0, 1, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(stage, n_microbatches=2)
    schedule.step(torch.ones(4, 4))
    with tlcore.capture(model, log_step_ids=[], output_dir=tmp_path) as captured:
        schedule.step(torch.ones(4, 4))
    run = tlcore.open_run(captured.url)
    assert run.steps == [0, 1] and not run.remarks
