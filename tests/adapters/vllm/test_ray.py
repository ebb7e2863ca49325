"""Workers under Ray on one machine: the plugin arrives there, and their ranks share a run."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report

pytestmark = [pytest.mark.slow, pytest.mark.deep]
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "ray_script.py")
ENTRY_POINTS = "[vllm.platform_plugins]\nray_cpu = tests.adapters.vllm.ray_platform:platform\n"


@pytest.fixture
def ray_path(tmp_path: Path) -> str:
    """A path for Python on which the platform of `tests.adapters.vllm.ray_platform` is declared."""
    metadata = tmp_path / "path" / "ray_cpu-0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ray_cpu\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    path = [str(metadata.parent), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, path))


def test_rays_workers_are_captured(tmp_path: Path, ray_path: str) -> None:
    output_dir = tmp_path / "dumps"
    # Ray puts sockets there, whose paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray_dir:
        said = report(
            SCRIPT,
            json.dumps({"output_dir": str(output_dir)}),
            ray_dir,
            timeout=500,
            environment={"PYTHONPATH": ray_path},
        )
    assert "RayExecutorV2" in said["executor"]
    assert len(set(said["static"])) == 1 and said["attached"] not in said["static"]
    for url in (said["static"][0], said["attached"]):
        run = tlcore.open_run(url)
        assert (run.state, run.steps, run.world_size) == ("complete", [0], 2)
        assert [place["tp_rank"] for place in run.ranks.values()] == [0, 1]
        ranks = {record["rank"] for record in run.step(0).records}
        assert ranks == {0, 1} and run.verify() == run.ledger.stored > 300
        assert len({(row["request_id"]) for row in run.step(0).rows or ()}) == 1
