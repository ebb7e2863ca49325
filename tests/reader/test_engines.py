"""Data-parallel engines in one run: each steps by itself, and a step may be one engine's alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tlcore
from tests.ranked import Model
from tlcore.adapters.vllm.worker.ranks import layout_of
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run, new_run_id
from tlcore.engine.session import Session
from tlcore.layout.names import device_label, rank_of
from tlcore.reader import Run

# Ranks 0 and 1 are the first engine, 2 and 3 the second, which takes two steps more.
STEPS = {0: 1, 1: 1, 2: 3, 3: 3}


@pytest.fixture(params=["pt", "safetensors", "shards"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    backend: Any = {"name": "safetensors", "layout": 1} if request.param == "shards" else request.param
    config = load_config(output_dir=str(tmp_path), backend=backend, log_step_ids=[], module_call_match=".")
    run_id = new_run_id()
    layout = layout_of(SimpleNamespace(tensor_parallel_size=2), len(STEPS))
    for rank, steps in STEPS.items():
        run = new_run(config, rank, len(STEPS), run_id)
        run.document["ranks"] = layout
        session = Session(config, run)
        model = Model(["layer"])
        session.attach(model)
        for number in range(steps):
            session.begin_step()
            model({"layer": torch.full((2, 3), float(10 * rank + number))})
            session.end_step()
        session.close()
    return tmp_path / run_id


def test_a_step_of_one_engine_alone_is_whole(path: Path) -> None:
    run = tlcore.open_run(path)
    assert (run.state, run.steps, run.incomplete_steps) == ("complete", [0, 1, 2], [])
    assert [run.step(number).ranks for number in run.steps] == [[0, 1, 2, 3], [2, 3], [2, 3]]
    assert all(step.complete for step in run.values())
    assert tlcore.open_run(path).step(2).complete
    assert float(run.tensor("step_2/layer/outputs_cpu_rank_3")[0, 0]) == 32
    assert run.verify() == run.ledger.stored == 2 * sum(STEPS.values())


def test_a_step_that_an_engine_did_not_finish_is_incomplete(path: Path) -> None:
    if not (path / "step_1").exists():
        # What a rank accepted and did not store leaves nothing in segments; and an index commits all or none.
        index = path / "segments" / "rank_3_000000_steps_0-2.json"
        index.unlink()
        (path / "segments" / "catalogue_rank_3.json").unlink()
        assert tlcore.open_run(path).incomplete_steps == [0, 1, 2]
        return
    (path / "step_1" / "step_rank_3.json").unlink()
    assert tlcore.open_run(path).incomplete_steps == [1]


@pytest.mark.parametrize("left", ["layer/outputs_cpu_rank_1.pt", "shard_rank_0_0.safetensors"])
def test_a_step_that_the_other_engine_began_is_incomplete(path: Path, left: str) -> None:
    if not (path / "step_1").exists():
        pytest.skip("segments have no files of a single step")
    (path / "step_1" / left).parent.mkdir(exist_ok=True)
    (path / "step_1" / left).write_bytes(b"")
    run = tlcore.open_run(path)
    assert (run.steps, run.incomplete_steps) == ([0, 2], [1])
    assert not tlcore.open_run(path).step(1).complete


def test_without_data_parallel_engines_every_rank_takes_part(path: Path) -> None:
    run = tlcore.open_run(path)
    places = layout_of(SimpleNamespace(tensor_parallel_size=4), len(STEPS))
    assert Run(run.stored.store, {**run.document, "ranks": places}).incomplete_steps == [1, 2]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("step_3/step.json", 0),
        ("step_3/step_rank_12.json", 12),
        ("step_3/module_calls_rank_1.txt", 1),
        ("step_3/layers.1/inputs.json", 0),
        ("step_3/layers.1/post_fwd_inputs_rank_2.json", 2),
        ("step_3/shard_rank_0_1.safetensors", 0),
        ("step_3/shard_rank_1_0.safetensors", 1),
        (f"step_3/layers.1/inputs_3_{device_label('cpu', 0)}.pt", 0),
        (f"step_3/layers.1/inputs_3_{device_label('cpu', 2)}.pt", 2),
        (f"step_3/layers.1/outputs_{device_label('cuda:1', 1)}.pt", 1),
        (f"step_3/layers.1/outputs_{device_label('cuda:0', 8)}.pt", 8),
    ],
)
def test_a_file_tells_which_rank_wrote_it(name: str, rank: int) -> None:
    assert rank_of(name) == rank
