"""Tensor parallelism over gloo: two processes on loopback write one run, which reads as the unsharded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tlcore
from tests.engine.two_processes import run_two
from tlcore.engine.staging.dtensors import placements_of_rows
from tlcore.errors import MissingError, ReadError
from tlcore.reader.placements import assembled

PROGRAM = """
import json, os, sys
from datetime import timedelta
import torch, torch.distributed as dist, tlcore
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

place, backend = sys.argv[1:]
dist.init_process_group("gloo", timeout=timedelta(seconds=60))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.kept, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
    def forward(self, x):
        self.kept(x)
        return self.down(self.up(x).relu())

torch.manual_seed(0)
model = Block()
x = torch.randn(3, 8)
single = "" if dist.get_rank() else tlcore.capture(model, output_dir=place, backend=backend)
if single:
    with single, torch.inference_mode():
        model(x)
plan = {"up": ColwiseParallel(), "kept": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
sharded = parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
with torch.no_grad():
    expected = sharded(x)
group = dist.group.WORLD
with tlcore.capture(sharded, output_dir=place, backend=backend, group=group) as joined, torch.no_grad():
    out = sharded(x)
with tlcore.capture(sharded, output_dir=place, backend=backend) as own, torch.no_grad():
    sharded(x)
whole = lambda each: each.full_tensor() if hasattr(each, "full_tensor") else each
same = torch.equal(whole(out), whole(expected))
print(json.dumps({"same": same, "single": single and single.url, "joined": joined.url, "own": own.url,
                  "ledger": joined.ledger.to_json()}))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_tensor_parallel_run_reads_as_the_unsharded_one(backend: str, tmp_path: Path) -> None:
    first, second = run_two(PROGRAM, str(tmp_path), backend)
    assert first["same"] and second["same"] and first["joined"] == second["joined"]
    single, joined = tlcore.open_run(first["single"]), tlcore.open_run(first["joined"])
    assert (joined.state, joined.world_size) == ("complete", 2)
    assert joined.verify() == joined.ledger.stored == joined.ledger.captured
    for name in (
        "up/inputs_0",
        "up/outputs",
        "kept/outputs",
        "down/inputs_0",
        "down/outputs",
        "_root/outputs",
    ):
        whole = single.tensor(f"step_0/{name}_cpu")
        assert torch.allclose(joined.tensor(f"step_0/{name}_cpu"), whole, atol=1e-5), name
    for name in ("up/outputs", "kept/outputs", "down/inputs_0"):
        assert joined.step(0).part(f"step_0/{name}_cpu").shape == (3, 6)
        assert joined.tensor(f"step_0/{name}_cpu_rank_1").shape == (3, 12)
    found = tlcore.compare(single, joined)
    assert found.equal and len(found.results) >= 8

    own = tlcore.open_run(second["own"])
    assert own.tensor("step_0/up/inputs_0_cpu").shape == (3, 8)
    with pytest.raises(MissingError, match=r"part of a tensor, and that of rank 0 is not here"):
        own.tensor("step_0/up/outputs_cpu")
    assert own.step(0).part("step_0/up/outputs_cpu").shape == (3, 6)


ROWS = """
import json, sys
from datetime import timedelta
import torch, torch.distributed as dist, tlcore
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

dist.init_process_group("gloo", timeout=timedelta(seconds=60))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.kept, self.end = nn.Embedding(9, 5), nn.Linear(5, 6), nn.Identity()
    def forward(self, input_ids, attention_mask=None):
        kept = self.kept(self.embed(input_ids))
        return self.end(kept.full_tensor() if hasattr(kept, "full_tensor") else kept)

torch.manual_seed(0)
model, group = Model(), dist.group.WORLD
ids, mask = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
urls = {}
for kind in ("single", "joined"):
    if kind == "joined":
        plan = {"kept": ColwiseParallel(use_local_output=False)}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    elif dist.get_rank():
        continue
    for name, keys in {"rows": {"rows": "last"}, "gradients": {"log_gradients": True}}.items():
        where = {"output_dir": sys.argv[1], "group": group if kind == "joined" else None}
        with tlcore.capture(model, **where, **keys) as capture, capture.step():
            model(ids, attention_mask=mask).square().sum().backward()
        urls[f"{kind} {name}"] = capture.url
print(json.dumps(urls))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_rows_and_gradients_of_sharded_tensors_are_joined(tmp_path: Path) -> None:
    urls, _ = run_two(ROWS, str(tmp_path))
    single, joined = (tlcore.open_run(urls[f"{kind} rows"]) for kind in ("single", "joined"))
    for name in ("kept/outputs_cpu", "end/outputs_cpu"):
        whole = single.tensor(f"step_0/{name}")
        assert whole.shape == (2, 6) and torch.allclose(joined.tensor(f"step_0/{name}"), whole, atol=1e-6)
        for sample in ("0", "1"):
            expected = single.request(sample)[name]
            assert torch.allclose(joined.request(sample)[name], expected, atol=1e-6)
    assert joined.step(0).part("step_0/kept/outputs_cpu").shape == (2, 3)
    single, joined = (tlcore.open_run(urls[f"{kind} gradients"]) for kind in ("single", "joined"))
    name = "step_0/kept/grad_outputs_cpu"
    assert torch.allclose(joined.tensor(name), single.tensor(name), atol=1e-6)
    assert joined.step(0).part(name).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("placements", "axis", "shape", "expected", "whole"),
    [
        (["S2"], 1, [5, 4], ["S1"], [5, 8]),
        (["S1"], 2, [5, 2, 4], ["S1"], [5, 4, 4]),
        (["S3"], 2, [5, 2, 4], ["S2"], [5, 2, 8]),
        (["S1"], 0, [5, 4], ["S1"], [5, 8]),
        (["R"], 1, [5, 4], ["R"], [5, 4]),
        (["Psum"], 1, [5, 4], ["Psum"], [5, 4]),
        (["S0"], 1, [5, 4], None, None),
        (["S1"], 1, [5, 4], None, None),
    ],
)
def test_rows_that_are_cut_have_placements_of_their_own(
    placements: list[str], axis: int, shape: list[int], expected: Any, whole: Any
) -> None:
    shapes = {0: [9, 8], 1: [3, 3, 8], 2: [3, 4, 3, 8]}
    known = {"mesh": [0, 1], "rank": 0, "shape": shapes[axis], "placements": placements}
    found = placements_of_rows(json.dumps(known), axis, shape)
    assert (found is None) == (expected is None)
    if found is not None:
        assert json.loads(found) == {**known, "placements": expected, "shape": whole}
    known["mesh"] = [0]
    alone = placements_of_rows(json.dumps(known), axis, shape)
    assert alone is not None and json.loads(alone)["placements"] == (expected or ["R"])


def _records(
    mesh: list[object], placements: list[str], shape: list[int], ranks: int
) -> dict[int, dict[str, object]]:
    return {
        rank: {
            "name": f"t_{rank}",
            "placements": {"mesh": mesh, "rank": rank, "shape": shape, "placements": placements},
        }
        for rank in range(ranks)
    }


WHOLE = torch.arange(24.0).reshape(6, 4)


@pytest.mark.parametrize(
    ("mesh", "placements", "parts"),
    [
        ([0, 1], ["S0"], [WHOLE[:4], WHOLE[4:]]),
        ([1, 0], ["S0"], [WHOLE[3:], WHOLE[:3]]),
        ([0, 1], ["R"], [WHOLE, None]),
        ([0, 1], ["Psum"], [WHOLE * 0.25, WHOLE * 0.75]),
        ([[0, 1], [2, 3]], ["S0", "S1"], [WHOLE[:3, :2], WHOLE[:3, 2:], WHOLE[3:, :2], WHOLE[3:, 2:]]),
        ([[0, 1], [2, 3]], ["S0", "S0"], [WHOLE[:2], WHOLE[2:3], WHOLE[3:5], WHOLE[5:]]),
        ([[0, 1], [2, 3]], ["R", "S1"], [WHOLE[:, :2], WHOLE[:, 2:], None, None]),
    ],
)
def test_parts_make_up_the_whole(
    mesh: list[object], placements: list[str], parts: list[torch.Tensor]
) -> None:
    records = _records(mesh, placements, [6, 4], len(parts))
    found = assembled(records[0], records, lambda record: parts[int(str(record["name"])[2:])])
    assert torch.equal(found, WHOLE)


def test_parts_that_are_not_there_or_of_an_unknown_kind_are_errors() -> None:
    records = _records([0, 1], ["S0"], [6, 4], 1)
    with pytest.raises(MissingError, match="that of rank 1 is not here"):
        assembled(records[0], records, lambda record: WHOLE[:3])
    for kind, shape in (("?", [6, 4]), ("S0", [9, 4])):
        records = _records([0, 1], [kind], shape, 2)
        with pytest.raises(ReadError):
            assembled(records[0], records, lambda record: WHOLE[:3])
