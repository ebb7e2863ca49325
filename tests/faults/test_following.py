"""`tlcore ls --follow` of a run in object storage, while that cannot be reached for a moment."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from torch import nn

import tlcore
from tests.deep import scaled
from tests.faults.helpers import options
from tests.faults.proxy import Fault, Handler, Proxy
from tests.servers import Server
from tests.waiting import join, wait_until
from tlcore.__main__ import main
from tlcore.cli import ls
from tlcore_backends.storage import retries

pytestmark = pytest.mark.slow


def outage(handler: Handler, method: str) -> bool:
    """Nothing is answered."""
    handler.count_fault()
    handler.hang_up()
    return True


def outage_of_steps(handler: Handler, method: str) -> bool:
    """Nothing is answered that tells of steps, as where an outage begins between two requests."""
    return ("_steps_" in handler.path or "step.json" in handler.path) and outage(handler, method)


@pytest.mark.parametrize("format", scaled(["safetensors"], ["safetensors", "pt"]))
@pytest.mark.parametrize("fault", [outage, outage_of_steps])
def test_what_is_committed_in_an_outage_is_told_after_it(
    fault: Fault,
    format: str,
    weed: Server,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ls, "_PAUSE_S", 0.05)
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.05)
    model = nn.Sequential(nn.Linear(4, 4))
    place = {"name": "fsspec", "format": format, "url": f"{weed.url}/followed-{fault.__name__}-{format}"}
    told: list[str] = []
    status: list[int] = []

    def heard() -> int:
        told.extend(capsys.readouterr().out.splitlines())
        return len(told)

    backend = {**place, "storage_options": weed.options}
    with tlcore.capture(model, backend=backend, log_step_ids=[]) as running:
        model(torch.ones(2, 4))
        running.session.flush()
        reached = json.dumps(options(weed, proxy.server_port))
        command = ["ls", running.url, "--follow", "--json", "--storage-options", reached]
        following = threading.Thread(target=lambda: status.append(main(command)))
        following.start()
        wait_until(lambda: heard() == 1, "the first step is told")
        proxy.fault = fault
        for _ in range(3):
            model(torch.ones(2, 4))
        running.session.flush()
        # More often than one request is tried.
        wait_until(lambda: proxy.faults > 12 or not following.is_alive(), "it asks again and again", 120)
        assert following.is_alive(), capsys.readouterr().err
        proxy.fault = None
        wait_until(lambda: heard() == 4, "what came meanwhile is told")
    join(following)
    heard()
    *steps, last = map(json.loads, told)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert (last["state"], status) == ("complete", [0])
