"""Faults of object storage: outputs stay, steps wait no longer than they may, the ledger adds up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

import tlcore
from tests.deep import scaled
from tests.faults import proxy as faults
from tests.faults.helpers import (
    SLACK_S,
    STEP_TENSORS,
    Outcome,
    assert_whole,
    backend,
    capture,
    files_below,
    local,
    options,
    remote_files,
)
from tests.faults.proxy import Proxy
from tests.servers import Server
from tlcore.__main__ import main
from tlcore_backends.storage.spill.delivery import STEP_END

pytestmark = pytest.mark.slow

BLOCK_S = 1.0
FORMATS = ["pt", "safetensors", "shards"]
END_OF_STEP = {
    "pt": "step_{0}/step.json",
    "safetensors": "segments/rank_0_{0:06}_steps_{0}.json",
    "shards": "step_{0}/step.json",
}
STEADY = {
    "503 SlowDown": faults.busy,
    "cut mid-PUT": faults.cut,
    "silent server": faults.silent,
    "slow drip": faults.drip,
    "expired credentials": faults.expired,
}
SAYS = {
    "503 SlowDown": "SlowDown",
    "cut mid-PUT": "onnection",
    "silent server": "no answer within 3.0 s",
    "slow drip": "no answer within 3.0 s",
    "expired credentials": "check the credentials",
}
# A queue of one step, so that the model feels whatever the writer waits for.
KEYS: dict[str, Any] = {"queue_bytes": 100_000, "block_s": BLOCK_S}


def start_fault(proxy: Proxy, fault: faults.Fault, at: int = 1) -> Callable[[tlcore.capture, int], None]:
    """A ``before_step`` that lets earlier steps be stored, then makes the proxy fail."""

    def before_step(captured: tlcore.capture, step: int) -> None:
        if step == at:
            captured.session.flush()
            proxy.fault = fault

    return before_step


def assert_unhurt(outcome: Outcome, steps: int) -> None:
    assert outcome.same_outputs
    assert max(outcome.step_s) < BLOCK_S + SLACK_S
    assert outcome.ledger.balanced
    assert outcome.ledger.captured == steps * STEP_TENSORS


def opened(outcome: Outcome, weed: Server) -> tlcore.Run:
    return tlcore.open_run(outcome.url, weed.options)


@pytest.mark.parametrize("name", STEADY)
def test_a_steady_fault_loses_its_own_steps_and_no_other(name: str, weed: Server, proxy: Proxy) -> None:
    steps = scaled(3, 6)
    # Short only where it is the deadline that ends a request.
    limits = {"deadline_s": 3.0, "attempts": 1} if name in ("silent server", "slow drip") else {}
    place = backend(weed, proxy, **limits)
    outcome = capture({**KEYS, "backend": place}, steps, start_fault(proxy, STEADY[name], at=1))
    assert_unhurt(outcome, steps)
    assert proxy.faults > 0
    assert outcome.ledger.stored == STEP_TENSORS
    assert outcome.ledger.failed > 0
    # At most one deadline for each step that waits, and one for run.json.
    assert outcome.close_s < (steps + 1) * 3.0 + SLACK_S
    failed, *more = outcome.warnings
    assert "could not be stored and counts as failed" in failed and SAYS[name] in failed
    assert len(more) <= 1 and all("the run could not be closed" in line for line in more)
    run = opened(outcome, weed)
    # A server that drips may finish a request after its client has gone.
    assert run.state == "incomplete" or name == "slow drip"
    # The end of a step whose every tensor was dropped is small enough to get through.
    assert [number for number in run.steps if len(run.step(number))] == [0]
    assert run.verify() == STEP_TENSORS


def test_a_burst_of_503_loses_nothing(weed: Server, proxy: Proxy) -> None:
    steps = scaled(4, 40)
    bursts = {2, 3, *range(10, steps, 5)}

    def before_step(captured: tlcore.capture, step: int) -> None:
        if step in bursts:
            captured.session.flush()
            proxy.fault = faults.times(3, faults.busy)

    outcome = capture(
        {**KEYS, "block_s": 30, "backend": backend(weed, proxy, attempts=4)}, steps, before_step
    )
    assert proxy.faults == 3 * len(bursts)
    assert outcome.same_outputs and outcome.warnings == []
    assert_whole(outcome, opened(outcome, weed), steps)


def test_a_bucket_deleted_in_the_run_is_said_once(weed: Server, proxy: Proxy) -> None:
    admin = fsspec.filesystem("s3", skip_instance_cache=True, **(weed.admin_options or {}))
    admin.mkdir("doomed")

    def before_step(captured: tlcore.capture, step: int) -> None:
        if step == 2:
            captured.session.flush()
            admin.rm("doomed", recursive=True)
            admin.invalidate_cache()

    place = backend(weed, proxy, url="s3://doomed/runs")
    outcome = capture({**KEYS, "backend": place}, 4, before_step)
    assert_unhurt(outcome, 4)
    assert outcome.ledger.stored == 2 * STEP_TENSORS
    assert "cannot write s3://doomed/runs/" in outcome.warnings[0]
    assert len(outcome.warnings) <= 2


@pytest.fixture
def large() -> nn.Sequential:
    """Its output is large enough for an upload in several parts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity())


@pytest.mark.parametrize("client", scaled(["obstore"], ["obstore", "s3fs"]))
def test_a_multipart_upload_cut_short_is_never_seen(
    client: str, weed: Server, proxy: Proxy, large: nn.Sequential, no_aws_variables: None
) -> None:
    extra = {"client_kwargs": {"region_name": "us-east-1"}} if client == "obstore" else {}
    megabytes = 12 if client == "obstore" else 104
    place = backend(weed, proxy, storage_options={**options(weed, proxy.server_port), **extra})
    x = torch.arange(megabytes << 18, dtype=torch.float32)
    proxy.fault = faults.cut_later_parts
    with tlcore.capture(
        large, module_call_match=".", backend={**place, "deadline_s": 20}, log_step_ids=[]
    ) as captured:
        assert torch.equal(large(x), x)
        captured.session.flush()
        assert proxy.faults > 0
        proxy.fault = None
        large(x)
    assert captured.ledger.balanced
    assert (captured.ledger.stored, captured.ledger.failed) == (2, 2)
    run = tlcore.open_run(captured.url, weed.options)
    assert run.steps == [1]
    # Files of step 0 that travelled beside the large one may be there; the large one is not.
    assert not any(name for number in run.incomplete_steps for name in run.step(number))
    assert run.verify() == 2
    assert torch.equal(run.tensor("step_1/0/outputs_cpu"), x)


# Each fault with one format in turn; in full, each with all.
SPILLED = [
    (name, format)
    for number, name in enumerate([*STEADY, "outage"])
    for format in scaled([FORMATS[number % 3]], FORMATS)
]


@pytest.mark.parametrize(("name", "format"), SPILLED)
def test_with_a_spill_dir_nothing_is_lost_when_the_fault_ends(
    name: str, format: str, weed: Server, proxy: Proxy, tmp_path: Path
) -> None:
    steps = scaled(4, 20)

    def before_step(captured: tlcore.capture, step: int) -> None:
        if step == 1:
            captured.session.flush()
            proxy.fault, proxy.down = STEADY.get(name), name == "outage"

    def before_close(captured: tlcore.capture) -> None:
        captured.session.flush()
        assert files_below(tmp_path / "spill") != {}
        proxy.fault, proxy.down = None, False
        proxy.released.set()

    keys = {**KEYS, "backend": backend(weed, proxy, format=format), "spill_dir": str(tmp_path / "spill")}
    outcome = capture(keys, steps, before_step, before_close)
    assert_unhurt(outcome, steps)
    assert outcome.close_s < 10 + SLACK_S
    (line,) = outcome.warnings
    assert "cannot be written now; until it can, everything goes to" in line
    run = opened(outcome, weed)
    assert_whole(outcome, run, steps)
    assert files_below(tmp_path / "spill") == {}
    assert_same_as_locally(run, format, steps, tmp_path)


def assert_same_as_locally(run: tlcore.Run, format: str, steps: int, tmp_path: Path) -> None:
    """The same files, byte for byte, as a capture to the local disk; only times and ids may differ."""
    here = capture({"output_dir": str(tmp_path / "local"), "backend": local(format)}, steps)
    expected, found = files_below(here.url), remote_files(run)
    assert found.keys() == expected.keys()
    timed = {name for name in expected if STEP_END.fullmatch(name) or name == "run.json"}
    assert {n: b for n, b in found.items() if n not in timed} == {
        n: b for n, b in expected.items() if n not in timed
    }


@pytest.mark.parametrize("format", FORMATS)
def test_push_delivers_what_a_run_left_byte_for_byte(
    format: str, weed: Server, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spill = tmp_path / "spill"

    def outage(captured: tlcore.capture, step: int) -> None:
        if step == 2:
            captured.session.flush()
            proxy.down = True
        if step == 4:
            captured.session.flush()
            assert main(["push", str(spill)]) == 1
            assert "its process is alive" in capsys.readouterr().out

    # Before the outage nothing is spilled, however slow the server is at the moment.
    patient = {**KEYS, "block_s": 4 * BLOCK_S}
    keys = {**patient, "backend": backend(weed, proxy, format=format), "spill_dir": str(spill)}
    outcome = capture(keys, 5, outage)
    assert_unhurt(outcome, 5)
    assert outcome.close_s < 10 + SLACK_S
    assert len(outcome.warnings) == 2 and "`tlcore push " in outcome.warnings[1]
    spilled = files_below(next(spill.iterdir()))
    spilled.pop("spill.json")
    ends = {name for name in spilled if STEP_END.fullmatch(name) and "catalogue" not in name}
    assert ends == {END_OF_STEP[format].format(step) for step in (2, 3, 4)}
    assert opened(outcome, weed).steps == [0, 1]
    for secret in weed.secrets:
        assert not any(secret.encode() in data for data in files_below(spill).values())

    # The process lives on, but the run is closed.
    assert main(["push", str(spill), "--storage-options", json.dumps(weed.options)]) == 0
    assert "delivered" in capsys.readouterr().out
    run = opened(outcome, weed)
    assert_whole(outcome, run, 5)
    delivered = remote_files(run)
    originals = {name: data for name, data in spilled.items() if not name.endswith(".copy")}
    assert {name: delivered[name] for name in originals} == originals
    assert list(spill.iterdir()) == []
    assert_same_as_locally(run, format, 5, tmp_path)


def waiting(spill: Path) -> list[Path]:
    return [path for path in spill.rglob("*") if path.is_file()]


def test_recovery_by_itself_goes_on_while_the_model_runs(weed: Server, proxy: Proxy, tmp_path: Path) -> None:
    """An outage, then recovery, then straight to the bucket again, all within one run."""
    seconds = scaled(2.0, 60.0)
    spill = tmp_path / "spill"
    ends: list[float] = []

    def before_step(captured: tlcore.capture, step: int) -> None:
        if step == 2:
            captured.session.flush()
            proxy.down = True
            ends.append(time.monotonic() + seconds)
        if 2 < step < 40:
            time.sleep(seconds / 37)
        if step == 40:
            assert time.monotonic() >= ends[0] - 0.5
            captured.session.flush()
            proxy.down = False
            deadline = time.monotonic() + 60
            while waiting(spill) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert waiting(spill) == []

    keys = {**KEYS, "backend": backend(weed, proxy, format="safetensors"), "spill_dir": str(spill)}
    outcome = capture(keys, 45, before_step)
    assert_unhurt(outcome, 45)
    assert len(outcome.warnings) == 1
    assert_whole(outcome, opened(outcome, weed), 45)


def test_an_outage_without_a_spill_dir_ends_and_later_steps_are_stored(weed: Server, proxy: Proxy) -> None:
    def before_step(captured: tlcore.capture, step: int) -> None:
        if step in (1, 3):
            captured.session.flush()
            proxy.down = step == 1

    outcome = capture({**KEYS, "backend": backend(weed, proxy)}, 6, before_step)
    assert_unhurt(outcome, 6)
    run = opened(outcome, weed)
    assert run.steps == [0, 3, 4, 5]
    assert (outcome.ledger.stored, outcome.ledger.failed) == (24, 12)
    assert run.state == "complete" and run.verify() == 24
    assert run.ledger.to_json() == outcome.ledger.to_json()
    assert len(outcome.warnings) == 1
