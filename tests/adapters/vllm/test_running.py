"""Attaching to a running engine: what is captured between attach and detach, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "running_script.py")


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("running")


@pytest.fixture(scope="module")
def said(output_dir: Path) -> dict[str, Any]:
    return report(SCRIPT, str(output_dir))


def test_steps_count_from_the_attach(said: dict[str, Any], output_dir: Path) -> None:
    run = tlcore.open_run(said["running"]["url"])
    assert Path(run.url).parent == output_dir
    assert (run.state, run.steps) == ("complete", [0, 2])
    prompt, decoded = (run.step(number).rows or [] for number in run.steps)
    assert prompt[0]["first_position"] == 0 and prompt[0]["rows"] > 1
    assert (decoded[0]["first_position"], decoded[0]["rows"]) == (prompt[0]["rows"] + 1, 1)
    assert run.verify() == run.ledger.stored > 100


def test_a_change_starts_another_run(said: dict[str, Any], output_dir: Path) -> None:
    assert len(list(output_dir.iterdir())) == 2
    assert said["changed"] != said["running"]["url"]
    run = tlcore.open_run(said["changed"])
    assert (run.state, run.steps) == ("complete", [0, 1, 2, 3])
    assert run.step(0).calls == [f"model.layers.{i}.mlp" for i in range(4)]
    assert said["closed"]["ledger"] == run.ledger.to_json()
    assert said["closed"]["state"] == "closed"


def test_a_detached_engine_has_no_hooks_and_the_same_tokens(said: dict[str, Any]) -> None:
    assert said["hooks"][0] == said["hooks"][-1] == 0
    assert all(tokens == said["tokens"][0] for tokens in said["tokens"])


def test_what_cannot_be_attached_is_refused_and_the_capture_goes_on(said: dict[str, Any]) -> None:
    (bad, off, second) = said["refused"]
    assert bad[0] == "ConfigError" and "$.log_step_ids" in bad[1]
    assert off[0] == "ConfigError" and "$.enabled" in off[1]
    assert second[0] == "CaptureError" and said["running"]["url"] in second[1]
    assert said["state_after_bad_change"] == "running"


def test_statistics_of_an_engine_with_and_without_the_bytes(said: dict[str, Any]) -> None:
    both, alone = tlcore.open_run(said["both"]), tlcore.open_run(said["stats"])
    assert both.verify() == both.ledger.stored == both.ledger.captured > 20
    assert alone.ledger.reasons == {"skipped: statistics only": both.ledger.captured}
    assert alone.step(0).described != both.step(0).described
    assert alone.step(0).stats == both.step(0).stats
    assert alone.step(0).rows is not None
    for name, found in both.step(0).stats.items():
        tensor = both.tensor(name).double()
        assert found.mean == pytest.approx(float(tensor.mean()), rel=1e-9, abs=1e-12)
        assert (found.numel, found.max) == (tensor.numel(), float(tensor.max()))
