"""A vLLM server under load, killed, interrupted and told to end."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import all_stored
from tests.deep import DEEP, scaled
from tests.faults.helpers import Usage, files_below, usage_of
from tests.faults.test_crash import assert_whole_file
from tests.faults.vllm_server import Served, served
from tests.waiting import join, wait_until

pytestmark = pytest.mark.slow

SEED = 20240607
MEGABYTE = 1 << 20
STOP_S = 90.0
QUEUE_BYTES = 64 * MEGABYTE
CONFIG = {
    "queue_bytes": QUEUE_BYTES,
    "module_call_match": [r"layers\.\d+$", r"mlp$", "embed_tokens", "norm$"],
}


def tokens_captured(run: tlcore.Run) -> dict[str, int]:
    """How many tokens of each request ran through the model, by the rows of the steps."""
    total: dict[str, int] = {}
    for number in run.steps:
        for row in run.step(number).rows or ():
            total[row["request_id"]] = total.get(row["request_id"], 0) + row["rows"]
    return total


def rounds_of_requests(
    server: Served, captured: bool = True
) -> tuple[list[dict[str, Any] | None], Usage, Usage]:
    """Every answer, and what the worker holds after the second round and after the last."""
    at_once, rounds, tokens = scaled((24, 3, 8), (200, 6, 16))
    samples: list[Usage] = []
    answers = []
    for _ in range(rounds):
        answers += server.many(at_once, at_once, tokens)
        if captured:
            _wait_for_steps(server, answers)
        samples.append(usage_of(server.process_id("VLLM::Worker")))
    return answers, samples[1], samples[-1]


def _wait_for_steps(server: Served, answers: list[dict[str, Any] | None]) -> None:
    """The last steps are still being stored after the answers, with open files."""
    expected = sum(tokens_run(each) for each in answers if each is not None)

    def stored() -> bool:
        return sum(tokens_captured(tlcore.open_run(server.directory)).values()) >= expected

    wait_until(stored, "the steps of all answers are stored", 120)


def tokens_run(answer: dict[str, Any]) -> int:
    """The last token that a request generates never runs through the model."""
    usage = answer["usage"]
    return int(usage["prompt_tokens"] + usage["completion_tokens"] - 1)


def growth_without_capture(tmp_path: Path) -> int:
    """How many bytes the worker of a server grows by that captures none of its steps."""
    place = tmp_path / "plain"
    place.mkdir()
    with served(place, {**CONFIG, "log_step_ids": [10**9]}) as server:
        _, settled, last = rounds_of_requests(server, captured=False)
    return last.memory - settled.memory


def test_many_requests_at_once_and_an_interrupt_at_the_end(tmp_path: Path) -> None:
    """SIGINT, as Ctrl-C sends it; the ledger is exact and the processes have not grown."""
    with served(tmp_path, CONFIG) as server:
        answers, settled, last = rounds_of_requests(server)
        server.server.end(signal.SIGINT)
        log = server.server.log.read_text()
    assert None not in answers
    assert last.handles == settled.handles and last.threads == settled.threads
    # The queue's memory is taken at its first use, and vLLM grows by itself in so many requests.
    plain = growth_without_capture(tmp_path) if DEEP else 0
    assert last.memory - settled.memory < plain + QUEUE_BYTES + 48 * MEGABYTE
    run = tlcore.open_run(server.directory)
    assert run.state == "complete", log[-3000:]
    assert run.incomplete_steps == []
    ledger = run.ledger
    assert all_stored(ledger) and ledger.stored == run.verify()
    assert sum(len(run.step(number)) for number in run.steps) == ledger.stored
    expected = sorted(tokens_run(answer) for answer in answers if answer is not None)
    assert sorted(tokens_captured(run).values()) == expected
    (line,) = (line for line in log.splitlines() if "intermediate tensors in " in line)
    assert f"{server.directory}: {ledger.to_json()}" in line


@pytest.mark.parametrize("number", range(scaled(1, 10)))
def test_a_process_of_the_engine_killed_at_a_random_moment(number: int, tmp_path: Path) -> None:
    chosen = random.Random(f"{SEED} {number}")
    format = chosen.choice(["pt", "safetensors"])
    with served(tmp_path, {**CONFIG, "backend": format}) as server:
        title = chosen.choice(["VLLM::EngineCore", "VLLM::Worker"])
        victim = server.process_id(title)
        load = threading.Thread(target=server.many, args=(16, 16, 100))
        load.start()
        wait_until(lambda: tlcore.open_run(server.directory).steps, "a step is stored")
        time.sleep(chosen.uniform(0.0, 1.5))
        server.server.watched.may_end = True
        os.kill(victim, signal.SIGKILL)
        server.server.process.wait(STOP_S)
        join(load)
    run = tlcore.open_run(server.directory)
    # A worker whose engine core has died ends by itself, and may still close its run.
    assert run.state == "incomplete" or title == "VLLM::EngineCore"
    assert len(run.steps) > 0
    assert run.verify() == run.ledger.stored > 0
    assert run.ledger.balanced
    for name, data in files_below(server.directory).items():
        if not name.endswith(".tmp"):
            assert_whole_file(name, data)
    for number_left in run.incomplete_steps:
        left = run.step(number_left)
        for name in left.names:
            assert isinstance(left[name], torch.Tensor)


@pytest.mark.deep
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_in_the_middle_of_requests(how: signal.Signals, tmp_path: Path) -> None:
    """What was captured until then is flushed; every tensor is accounted for."""
    with served(tmp_path, CONFIG) as server:
        load = threading.Thread(target=server.many, args=(16, 16, 200))
        load.start()
        wait_until(lambda: len(tlcore.open_run(server.directory).steps) > 2, "three steps are stored")
        server.server.end(how)
        join(load)
        log = server.server.log.read_text()
    run = tlcore.open_run(server.directory)
    assert run.state == "complete", log[-3000:]
    assert run.incomplete_steps == []
    assert all_stored(run.ledger) and run.ledger.stored == run.verify()
