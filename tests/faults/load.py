"""Captures a small model for many steps and watches its own process: ``python -m tests.faults.load``.

Arguments: output_dir, backend, number of steps. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

import tlcore
from tests.faults.helpers import Usage, usage_of


def main(output_dir: str, backend: str, steps: int) -> None:
    """Sample the process's memory, handles and threads twenty times on the way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    expected = module(x)
    samples: list[Usage] = []
    same = True
    keys: dict[str, Any] = {
        "output_dir": output_dir,
        "backend": backend,
        "queue_bytes": 1 << 20,
        "block_s": 60,
    }
    with (
        torch.no_grad(),
        tlcore.capture(module, log_step_ids=[], **{"module_call_match": ".", **keys}) as captured,
    ):
        for step in range(steps):
            same &= torch.equal(module(x), expected)
            if step % (steps // 20) == steps // 20 - 1:
                captured.session.flush()
                samples.append(usage_of("self"))
    report = {"url": captured.url, "same": same, "samples": samples, "ledger": captured.ledger.to_json()}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
