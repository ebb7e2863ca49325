"""Context parallelism over gloo: two processes share the tokens of each sequence, and write one run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

import tlcore
from tests.engine.two_processes import run_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]
PROGRAM = """
import json, sys
from datetime import timedelta
import torch, torch.distributed as dist, tlcore
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

place, how = sys.argv[1:]
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
mesh = init_device_mesh("cpu", (2,))

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
    def forward(self, x, later):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if isinstance(k, DTensor):
            # Every token sees those before it, wherever they are.
            k, v = (each.redistribute(mesh, [Replicate()]) for each in (k, v))
        return self.o((q @ k.transpose(1, 2) + later).softmax(-1) @ v)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x, later):
        x = x + self.attention(self.norm(x), later)
        return x + self.down(self.up(x).relu())

torch.manual_seed(0)
model, x = Block().eval(), torch.randn(2, 8, 16)
later = torch.full((8, 8), -1e9).triu(1).expand(2, 8, 8).contiguous()
found = {}
if dist.get_rank() == 0:
    with tlcore.capture(model, output_dir=place) as capture, torch.no_grad():
        model(x, later)
    found["single"] = capture.url
if how == "placed":
    distribute_module(model, mesh)
    x, later = (distribute_tensor(each, mesh, [Shard(1)]) for each in (x, later))
else:
    # Nothing tells of such tensors that they are parts.
    x, later = x.chunk(2, 1)[dist.get_rank()].clone(), later[:, :4, :4].clone()
with tlcore.capture(model, output_dir=place, group=dist.group.WORLD) as capture, torch.no_grad():
    model(x, later)
found["joined"] = capture.url
print(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def test_the_shares_of_sequences_are_joined_as_their_placements_tell(tmp_path: Path) -> None:
    first, _ = run_two(PROGRAM, str(tmp_path), "placed")
    joined = tlcore.open_run(first["joined"])
    assert (joined.state, joined.world_size) == ("complete", 2)
    for name in ("norm/outputs_cpu", "attention.q/outputs_cpu", "attention/outputs_cpu", "down/outputs_cpu"):
        assert joined.tensor(f"step_0/{name}").shape == (2, 8, 16)
        assert joined.step(0).part(f"step_0/{name}").shape == (2, 4, 16)
    found = tlcore.compare(first["single"], joined)
    assert found.equal, str(found)
    assert {each.module for each in found.results} >= {"", "norm", "attention", "attention.k", "up", "down"}


def test_shares_that_nothing_tells_of_are_said_to_be_compared_as_they_are(tmp_path: Path) -> None:
    first, _ = run_two(PROGRAM, str(tmp_path), "plain")
    found = tlcore.compare(first["single"], first["joined"])
    assert not found.equal
    assert {each.reason for each in found.results if each.module == "norm"} == {
        "shapes (2, 8, 16) and (2, 4, 16) differ"
    }
    (note,) = (each for each in found.notes if "as each rank has them" in each)
    assert "1 rank against 2" in note
