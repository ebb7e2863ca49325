"""Clients over HTTP that leave, or take nothing, in the middle of a large body."""

from __future__ import annotations

import resource
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.ranked import requests_run
from tests.waiting import join, wait_until
from tlcore.adapters.vllm.frontend import deliveries, paced
from tlcore.adapters.vllm.frontend.deliveries import HEADER, Asked
from tlcore.adapters.vllm.frontend.endpoint import EndpointPlugin
from tlcore.adapters.vllm.reports import VARIABLE

REQUEST = "cmpl-a-0-0123abcd"
ROWS, WIDTH = 3000, 2048
BODY_BYTES = ROWS * WIDTH * 4


class _Engine:
    """An engine's client, whose one rank has stored the request."""

    engine_core = None
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1))

    def __init__(self, run: Any) -> None:
        self._known = {"run_id": run.id, "url": run.url, "steps": run.steps}

    async def collective_rpc(self, method: str, args: Any) -> list[dict[str, Any]]:
        return [{"rank": 0, "state": "running", "done": True, "requests": {REQUEST: self._known}}]


class _Server:
    """A server of its own, with what delivers and nothing else."""

    def __init__(self, engine: _Engine, http: str) -> None:
        import uvicorn
        from fastapi import FastAPI

        app, self.plugin = FastAPI(), EndpointPlugin()
        self.plugin.attach_router(app)
        self.plugin._engine, self.plugin._guarded = engine, True

        async def passes_on(request: Any, call: Any) -> Any:
            return await call(request)

        if http == "h11":
            # As `--middleware` does, which takes the response apart.
            app.middleware("http")(passes_on)
        config = uvicorn.Config(app, port=0, http=http, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_until(lambda: self._server.started, "the server", 30)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]

    @property
    def taken(self) -> int:
        """How many bytes are being fetched."""
        return self.plugin._room._taken

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        join(self._thread)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    values = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    steps = [[(REQUEST, ROWS, 0)]]
    return requests_run(
        tmp_path_factory.mktemp("run"), steps, lambda step, rows: {"a": values}, backend="safetensors"
    )


@pytest.fixture(params=["httptools", "h11"])
def server(
    request: pytest.FixtureRequest, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[_Server]:
    pytest.importorskip(request.param)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shared"))
    monkeypatch.setattr(deliveries, "_here", {})
    running = _Server(_Engine(run), request.param)
    yield running
    running.close()


def _delivered() -> str:
    """A request whose answer was given; returns what opens it."""
    asked = Asked({"state": {"request_metadata": SimpleNamespace(request_id="cmpl-a")}})
    delivery = asked.deliver()
    delivery.add(REQUEST, "cmpl-a-0", 1)
    delivery.end(True)
    assert asked.token is not None
    return asked.token


def _begin(server: _Server, token: str) -> socket.socket:
    """A client that asks for the tensors, takes some and has no room for more."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    client.connect(("127.0.0.1", server.port))
    line = f"GET /v1/tlcore/requests/cmpl-a.safetensors HTTP/1.1\r\nHost: x\r\n{HEADER}: {token}\r\n\r\n"
    client.sendall(line.encode())
    client.settimeout(60)
    assert client.recv(1 << 12).startswith(b"HTTP/1.1 200 ")
    return client


def _fetched(server: _Server, token: str) -> dict[str, torch.Tensor]:
    url = f"http://127.0.0.1:{server.port}/v1/tlcore/requests/cmpl-a.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={HEADER: token}), timeout=60) as answer:
        return load(answer.read())


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_client_that_leaves_in_the_middle_gives_all_back(server: _Server, run: Any) -> None:
    token = _delivered()
    expected = _fetched(server, token)
    before = _resident()
    for reset in (True, False) * 2:
        client = _begin(server, token)
        # It is not sent yet, so there is no room for as much again.
        assert server.taken >= BODY_BYTES
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(lambda: server.taken == 0, "what was being fetched is given back", 30)
    assert _resident() - before < 2 * BODY_BYTES
    again = _fetched(server, token)
    assert again.keys() == expected.keys() and torch.equal(
        again["a/outputs"], run.request(REQUEST)["a/outputs_cpu"]
    )
    wait_until(lambda: server.taken == 0, "what was fetched is given back", 30)


def test_a_client_that_takes_nothing_is_given_up(
    server: _Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = _delivered()
    monkeypatch.setattr(paced, "STALLED_S", 1.0)
    client = _begin(server, token)
    wait_until(lambda: server.taken == 0, "a client that takes nothing is given up", 30)
    assert "has not gone on" in caplog.text
    # What there is ends before the length that was told.
    rest = 0
    while part := client.recv(1 << 20):
        rest += len(part)
    assert 0 < rest < BODY_BYTES
    client.close()
    assert _fetched(server, token)
