"""The eager capture with older releases of vLLM, in environments of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.helpers import all_stored
from tests.amx import with_amx
from tests.compat.engine_script import TOKENS
from tests.compat.environments import RELEASES, REPOSITORY, python_of
from tests.models import tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.deep]
GUIDE = REPOSITORY / "examples" / "vllm.md"
_CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
# In one process, both prompts are queued before the first step runs.
ENVIRONMENT = {
    **_CLEAN,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": with_amx(None),
}


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A release and its Python."""
    return request.param, python_of(request.param)


def _report(python: Path, config: dict[str, Any] | None, directory: Path) -> dict[str, Any]:
    script = REPOSITORY / "tests" / "compat" / "engine_script.py"
    done = subprocess.run(
        [str(python), str(script), str(tiny_llama()), json.dumps(config)],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(lines[0].removeprefix("REPORT "))
    return found


def test_the_eager_capture_works(release: tuple[str, Path], tmp_path: Path) -> None:
    version, python = release
    plain = _report(python, None, tmp_path)
    captured = _report(python, {"output_dir": str(tmp_path / "dumps"), "log_step_ids": []}, tmp_path)
    assert plain["version"].startswith(version)
    assert captured == plain
    (run,) = map(tlcore.open_run, (tmp_path / "dumps").iterdir())
    assert (run.state, run.steps) == ("complete", list(range(TOKENS)))
    assert all_stored(run.ledger) and run.ledger.stored > 400
    assert run.verify() > 0
    step = run.step(0)
    assert {"model", "model.embed_tokens", "model.layers.3.mlp", "logits_processor"} <= set(step.calls)
    # Both prompts run in the first step, and the rows say which is which.
    ids = run.tensor("step_0/model.embed_tokens/inputs_0_cpu").tolist()
    rows = step.rows
    assert rows is not None
    for row, prompt in zip(rows, plain["prompts"], strict=True):
        assert ids[row["first_row"] :][: row["rows"]] == prompt


def test_the_guide_names_the_release(release: tuple[str, Path]) -> None:
    assert release[0] in GUIDE.read_text()
