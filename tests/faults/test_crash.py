"""Processes that die at any moment: what is committed is whole, the rest is named."""

from __future__ import annotations

import io
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tlcore
from tests.deep import scaled
from tests.faults.helpers import backend, files_below
from tests.faults.processes import Death, Workers, workers
from tests.faults.proxy import Proxy
from tests.faults.worker import MODULES
from tests.servers import Server
from tlcore.reader import list_runs
from tlcore_backends.storage.spill import push as pushing

pytestmark = pytest.mark.slow

SEED = 20240607
KILLS = scaled(4, 34)
STEP_TENSORS = 2 * MODULES


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with workers(tmp_path_factory.mktemp("crash") / "stderr") as running:
        yield running


def assert_crashed_well(death: Death, options: dict[str, Any] | None = None) -> tuple[int, int]:
    """Check a killed process's run; returns how many steps it committed and how many it left."""
    assert death.status == -signal.SIGKILL
    if death.url is None:
        assert death.stored == []
        return 0, 0
    run = tlcore.open_run(death.url, options)
    assert run.state == "incomplete"
    assert set(death.stored) <= set(run.steps), "a step that was said to be stored is gone"
    assert run.verify() == len(run.steps) * STEP_TENSORS
    for name in run.stored.files.sizes:
        assert_whole_file(name, run.stored.files.read(name))
    for number in run.incomplete_steps:
        assert_readable(run, number)
    assert run.ledger.balanced
    assert run.ledger.stored == len(run.steps) * STEP_TENSORS
    return len(run.steps), len(run.incomplete_steps)


def assert_readable(run: tlcore.Run, number: int) -> None:
    """What is whole in a step without ``step.json`` can be read, with the right values."""
    step = run.step(number)
    assert not step.complete
    with pytest.raises(tlcore.ReadError, match=f"step {number} is incomplete"):
        run[number]
    for name in step.names:
        module, direction = name.split("/")[1:]
        expected = number + int(module) + direction.startswith("outputs")
        assert torch.equal(step[name], torch.full((32, 32), float(expected)))


def assert_whole_file(name: str, data: bytes) -> None:
    """A file with a final name is not half-written."""
    if name.endswith(".pt"):
        torch.load(io.BytesIO(data), weights_only=True)
    elif name.endswith(".json"):
        json.loads(data)
    elif name.endswith(".safetensors"):
        assert safetensors.torch.load(data)
    else:
        assert name.endswith("module_calls.txt") and data.endswith(b"\n"), name


def moments(name: str) -> list[float]:
    """When to kill, in seconds: seeded."""
    chosen = random.Random(f"{SEED} {name}")
    return [chosen.uniform(0.0, 1.0) for _ in range(KILLS)]


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_killed_at_any_moment(format: str, crashing: Workers, tmp_path: Path) -> None:
    """Every second time counted from the process's start, so that some die before their first file."""
    keys = {"output_dir": str(tmp_path), "backend": format}
    found = [
        assert_crashed_well(crashing.run(keys, "forever", after, from_first_step=bool(number % 2)))
        for number, after in enumerate(moments(format))
    ]
    committed, left = (sum(column) for column in zip(*found, strict=True))
    assert committed > 0
    # Of a step of one small shard there is hardly ever a part.
    if KILLS > 30 and format == "pt":
        assert left > 0, "no kill hit a step that was being written"
    for run in list_runs(tmp_path):
        assert run.problem is None


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_killed_while_writing_to_object_storage(format: str, crashing: Workers, weed: Server) -> None:
    place = {"name": "fsspec", "url": f"{weed.url}/crash-{format}", "format": format}
    keys = {"backend": {**place, "storage_options": weed.options}}
    chosen = moments(f"fsspec {format}")[: scaled(1, 17)]
    found = [
        assert_crashed_well(crashing.run(keys, "forever, slowly", after, from_first_step=True), weed.options)
        for after in chosen
    ]
    assert sum(committed for committed, _ in found) > 0


@pytest.mark.parametrize("format", scaled(["safetensors"], ["pt", "safetensors"]))
def test_killed_in_an_outage_loses_no_spilled_step(
    format: str, crashing: Workers, weed: Server, proxy: Proxy, tmp_path: Path
) -> None:
    for number, after in enumerate(moments(f"spill {format}")[: scaled(1, 10)]):
        spill = tmp_path / str(number)
        proxy.down = False
        place = backend(weed, proxy, format=format)
        keys = {"backend": place, "spill_dir": str(spill), "block_s": 1.0}

        def outage() -> None:
            proxy.down = True

        death = crashing.run(keys, "forever, slowly", 1.0 + after, True, outage)
        proxy.down = False
        assert death.status == -signal.SIGKILL and death.url is not None
        for run in pushing.spilled_runs(str(spill)):
            assert not run.owner_alive
            pushing.push(run, weed.options)
        assert files_below(spill) == {}
        committed, _ = assert_crashed_well(death, weed.options)
        assert committed > max(death.stored) >= 2


@pytest.mark.parametrize("format", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("ends", "status"), [("without_close", 0), ("interrupted", -signal.SIGINT), ("forks", 0)]
)
def test_a_process_that_ends_without_close_loses_nothing(
    ends: str, status: int, format: str, crashing: Workers, tmp_path: Path
) -> None:
    death = crashing.run({"output_dir": str(tmp_path), "backend": format}, ends)
    assert death.status == status, crashing.errors()
    assert death.url is not None
    run = tlcore.open_run(death.url)
    assert (run.state, run.steps, run.incomplete_steps) == ("complete", [0, 1, 2], [])
    assert run.verify() == run.ledger.stored == run.ledger.captured == 3 * STEP_TENSORS


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_a_process_that_ends_without_close_delivers_to_object_storage(
    format: str, crashing: Workers, weed: Server
) -> None:
    place = {"name": "fsspec", "url": f"{weed.url}/exits", "format": format}
    death = crashing.run({"backend": {**place, "storage_options": weed.options}}, "without_close")
    assert death.status == 0 and death.url is not None, crashing.errors()
    run = tlcore.open_run(death.url, weed.options)
    assert (run.state, run.steps) == ("complete", [0, 1, 2])
    assert run.verify() == run.ledger.stored == 3 * STEP_TENSORS


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_an_exception_in_the_model_keeps_what_was_captured(
    format: str, crashing: Workers, tmp_path: Path
) -> None:
    death = crashing.run({"output_dir": str(tmp_path), "backend": format}, "model_raises")
    assert death.status == 1 and death.url is not None
    assert "ValueError: on purpose" in crashing.errors()
    run = tlcore.open_run(death.url)
    assert (run.state, run.steps) == ("complete", [0, 1, 2])
    # Half of the modules whole, and the inputs of the one that raised.
    assert len(run.step(2)) == 2 * (MODULES // 2) + 1
    assert run.verify() == run.ledger.stored == run.ledger.captured == 2 * STEP_TENSORS + MODULES + 1
