"""What the vLLM tests share: the environment of their processes, and how to run one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.adapters.vllm.prepared import FORKS, Prepared
from tests.amx import with_amx
from tlcore.ledger import Counts

REPOSITORY = Path(__file__).parents[3]
# For engines of several ranks, which would otherwise each take the cores that vLLM sees.
SEVERAL_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# Where it is not tested how their processes start: those are forks of the script's.
FORKED_RANKS = {**SEVERAL_RANKS, FORKS: "1"}
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": with_amx(os.environ.get("PYTHONPATH")),
}


def all_stored(ledger: Counts) -> bool:
    """Whether all was stored but the head, a module that the logits processor gets as an argument."""
    left_out = ledger.reasons.get("skipped: module", 0)
    return ledger.balanced and left_out == ledger.skipped and ledger.stored == ledger.captured - left_out > 0


def run(
    *arguments: str, timeout: float = 600, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` in the repository's root; ``environment`` goes over the usual one."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


_prepared = Prepared(REPOSITORY, ENVIRONMENT)


def run_script(
    script: str, *arguments: str, timeout: float = 600, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script with `run`'s arguments where vLLM is imported already."""
    return _prepared.run([script, *arguments], {**ENVIRONMENT, **(environment or {})}, timeout)


def say_and_end(found: Any) -> NoReturn:
    """End a script with what `report` is to read, whatever an engine has left running."""
    sys.stdout.write(f"\nREPORT {json.dumps(found)}\n")
    sys.stdout.flush()
    os._exit(0)


def answered(url: str, outputs: Sequence[Any]) -> dict[str, Any]:
    """What a script reports of a run and of vLLM's ``outputs``: where it lies, ids, all tokens of each."""
    return {
        "url": url,
        "ids": [each.request_id for each in outputs],
        "tokens": [list(each.prompt_token_ids or ()) + list(each.outputs[0].token_ids) for each in outputs],
    }


def report(
    script: str,
    *arguments: str,
    timeout: float = 600,
    environment: Mapping[str, str] | None = None,
    anew: bool = False,
) -> dict[str, Any]:
    """Run a script that prints ``REPORT`` and one JSON object; returns the object.

    One that changes what vLLM sees when it is imported has to begin ``anew``, without it.
    """
    start = run if anew else run_script
    done = start(script, *arguments, timeout=timeout, environment=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(lines[0].removeprefix("REPORT "))
    return found


def prepare_stages(llm: Any) -> None:
    """Let the later stages of a pipeline make their receive buffers.

    vLLM 0.32 does so in a dummy run, which its CPU worker leaves out in eager mode.
    """
    llm.collective_rpc("execute_dummy_batch")


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results of the same computation by different kernels agree.

    Each side rounds in every kernel, bfloat16 by up to 2**-9 and float32 by 2**-24 of the value; the norm of
    the difference is what adds up over the layers.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = 2**-14 if one.dtype == torch.float32 else 2**-6
    return float((one.float() - other.float()).norm()) <= tolerance * float(other.float().norm())
