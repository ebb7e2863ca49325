"""DDP and FSDP over gloo: two processes on loopback, each with a run of its own, gradients unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tlcore
from tests.engine.two_processes import run_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

PROGRAM = """
import json, os, sys
from datetime import timedelta
import torch, torch.distributed as dist, tlcore
from torch import nn

mode, place, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))

def wrapped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[2], mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.fsdp import FullyShardedDataParallel
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

def train(model):
    torch.manual_seed(10 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        x = torch.randn(5, 4)
        out = model(x)
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        grads = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        found += [x, out.detach(), *[g.clone() for g in grads]]
        optimizer.step()
        optimizer.zero_grad()
    return found

expected = train(wrapped())
model = wrapped()
with tlcore.capture(model, output_dir=place, log_step_ids=[]) as captured:
    found = train(model)
same = len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))
print(json.dumps({"same": same, "url": captured.url, "rank": rank, "grads": len(found),
                  "ledger": captured.ledger.to_json(), "x": found[0].tolist()}))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mode", ["ddp", "fully_shard", "FullyShardedDataParallel"])
def test_two_processes_train_the_same_and_each_has_its_run(mode: str, tmp_path: Path) -> None:
    found = run_two(PROGRAM, mode, str(tmp_path))
    assert len({str(each["url"]) for each in found}) == 2
    for each in found:
        assert each["same"], each
        run = tlcore.open_run(str(each["url"]))
        assert run.state == "complete" and run.steps == [0, 1, 2]
        assert run.verify() == run.ledger.stored == run.ledger.captured
        step = run.step(0)
        first = next(call for call in step.calls if call.endswith("0"))
        assert step.call(first).inputs.args[0].tolist() == each["x"]
        assert any(isinstance(step.call(call).outputs, torch.Tensor) for call in step.calls)
