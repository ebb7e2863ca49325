"""A vLLM server that captures to object storage: an outage in the middle, its end, and a death by SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.deep import scaled
from tests.faults.helpers import SLACK_S, capture, files_below, options
from tests.faults.proxy import Proxy
from tests.faults.test_vllm import CONFIG, STOP_S, tokens_captured, tokens_run
from tests.faults.vllm_server import Served, served
from tests.servers import Server
from tests.waiting import join, wait_until
from tlcore.__main__ import main
from tlcore.reader import list_runs
from tlcore.record import is_running

pytestmark = pytest.mark.slow

CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
COMMIT_S = 1
# How long the server works before it is killed.
LOAD_S = scaled(2.0, 20.0)
# Who is killed, in this order, and whether the place can be reached then.
VICTIMS: list[tuple[str, ...]] = [(WORKER, CORE), (CORE,), (WORKER,)]
DEATHS = [(who, when) for who in VICTIMS for when in ("writing", "outage")][: scaled(1, 6)]


def place_at(weed: Server, proxy: Proxy, folder: str) -> dict[str, Any]:
    return {
        "name": "fsspec",
        "format": "safetensors",
        "url": f"{weed.url}/{folder}",
        "storage_options": options(weed, proxy.server_port),
        "deadline_s": 10.0,
        "attempts": 2,
        "commit_s": COMMIT_S,
    }


def wait_until_stored(server: Served, answers: list[dict[str, Any] | None]) -> None:
    """Nobody asks for it: what is older than ``commit_s`` is committed by itself."""
    expected = sum(tokens_run(each) for each in answers if each is not None)
    wait_until(
        lambda: sum(tokens_captured(server.run()).values()) >= expected, "all answers' steps are stored", 120
    )


class Load:
    """Requests without end, until their server is gone."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            self._server.many(8, 8, 100)

    def end(self) -> None:
        self._over.set()
        join(self._thread)


def work_through_an_outage(server: Served, proxy: Proxy, spill: Path) -> list[dict[str, Any] | None]:
    """The answers before, in and after it; in the end all of them are stored where they belong."""
    answers = server.many(8, 8, 8)
    wait_until_stored(server, answers)
    steps = server.run().steps
    proxy.down = True
    answers += server.many(8, 8, 8)
    wait_until(lambda: files_below(spill), "what cannot be sent waits in the spill_dir")
    assert server.run().steps == steps
    answers += server.many(8, 8, 8)
    proxy.down = False
    wait_until_stored(server, answers)
    wait_until(lambda: not files_below(spill), "nothing waits any more")
    answers += server.many(8, 8, 8)
    wait_until_stored(server, answers)
    assert None not in answers
    return answers


def kill(server: Served, titles: tuple[str, ...]) -> float:
    """When it was; nothing of the server runs after it."""
    processes = {title: server.process_id(title) for title in (CORE, WORKER)}
    server.server.watched.may_end = True
    for title in titles:
        os.kill(processes[title], signal.SIGKILL)
    when = time.time()
    server.server.process.wait(STOP_S)
    # A worker whose engine core has died ends by itself, and may still close its run.
    wait_until(lambda: not any(map(is_running, processes.values())), "both processes have ended", STOP_S)
    return when


@pytest.mark.parametrize(("titles", "when"), DEATHS)
def test_killed_after_an_outage(
    titles: tuple[str, ...], when: str, weed: Server, proxy: Proxy, tmp_path: Path
) -> None:
    spill = tmp_path / "spill"
    place = place_at(weed, proxy, tmp_path.name)
    with served(tmp_path, {**CONFIG, "backend": place, "spill_dir": str(spill)}, weed.options) as server:
        answers = work_through_an_outage(server, proxy, spill)
        steps = len(server.run().steps)
        load = Load(server)
        time.sleep(LOAD_S)
        wait_until(lambda: len(server.run().steps) > steps, "a step of the load is stored")
        if when == "outage":
            proxy.down = True
            wait_until(lambda: files_below(spill), "what cannot be sent waits in the spill_dir")
        killed_at = kill(server, titles)
        load.end()
    proxy.down = False
    assert main(["push", str(spill), "--storage-options", json.dumps(weed.options)]) == 0
    assert files_below(spill) == {}
    run = tlcore.open_run(server.url, weed.options)
    assert_sound(run)
    assert run.state == "incomplete" or titles == (CORE,)
    found = tokens_captured(run)
    for answer in answers:
        assert answer is not None
        (tokens,) = (count for name, count in found.items() if name.startswith(answer["id"]))
        assert tokens == tokens_run(answer)
    last = datetime.fromisoformat(run.step(run.steps[-1]).documents[0]["ended"]).timestamp()
    assert killed_at - last < COMMIT_S + 2 * SLACK_S
    assert_another_run_fits_beside(run, place, weed)


def assert_sound(run: tlcore.Run) -> None:
    """What is committed is whole, in order, and all that the ledger tells."""
    assert run.steps == list(range(len(run.steps)))
    assert run.incomplete_steps == []
    assert run.ledger.balanced
    assert run.verify() == run.ledger.stored == sum(len(run.step(number)) for number in run.steps) > 0


def assert_another_run_fits_beside(run: tlcore.Run, place: dict[str, Any], weed: Server) -> None:
    """A run that begins in the same place is whole, and the other one stays what it is."""
    before = run.verify()
    outcome = capture({"backend": place}, 3)
    (first, second) = list_runs(place["url"], weed.options)
    assert (first.path, second.path) == (run.url, outcome.url)
    assert tlcore.open_run(outcome.url, weed.options).verify() == outcome.ledger.stored > 0
    assert tlcore.open_run(run.url, weed.options).verify() == before
