"""The route that requests are fetched by, on an app of its own: which status stands for what."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tlcore.adapters.vllm.frontend.deliveries import HEADER, Asked, Delivery
from tlcore.adapters.vllm.frontend.endpoint import EndpointPlugin
from tlcore.adapters.vllm.reports import VARIABLE

NEVER, AT_ONCE = 10**6, 1


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shared"))
    return tmp_path / "shared"


class _Client:
    """An engine's client whose two ranks have stored everything after so many questions."""

    engine_core = None
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))

    def __init__(self, *rounds: int) -> None:
        self._rounds = rounds
        self._asked = 0

    async def collective_rpc(self, method: str, args: Any) -> list[dict[str, Any]]:
        self._asked += 1
        return [
            {"rank": rank, "state": "flushing", "done": self._asked >= needed, "requests": {}}
            for rank, needed in enumerate(self._rounds)
        ]


def _delivery(public_id: str) -> tuple[Delivery, str]:
    asked = Asked({"state": {"request_metadata": SimpleNamespace(request_id=public_id)}})
    delivery = asked.deliver()
    assert asked.token is not None
    delivery.add(f"{public_id}-0-0123abcd", f"{public_id}-0", 1)
    return delivery, asked.token


def _get(client: Any, path: str, token: str, guarded: bool = True) -> tuple[int, dict[str, Any]]:
    from fastapi import FastAPI

    app, sent = FastAPI(), []
    plugin = EndpointPlugin()
    plugin.attach_router(app)
    plugin._engine, plugin._guarded = client, guarded
    name, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/v1/tlcore/requests/{name}",
        "query_string": query.encode(),
        "headers": [(HEADER.lower().encode(), token.encode())],
        "root_path": "",
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]


def test_the_ranks_that_are_late_are_named_with_504() -> None:
    delivery, token = _delivery("cmpl-a")
    delivery.end(True)
    status, error = _get(_Client(AT_ONCE, NEVER), "cmpl-a?timeout=0.3", token)
    assert status == 504 and error["message"].startswith("ranks [1] have not stored the request")


def test_before_the_answer_is_complete_it_is_waited_for() -> None:
    _, token = _delivery("cmpl-a")
    status, error = _get(_Client(AT_ONCE, AT_ONCE), "cmpl-a?timeout=0.1", token)
    assert status == 504 and "not complete" in error["message"]


def test_wrong_tokens_and_servers_without_a_key() -> None:
    delivery, token = _delivery("cmpl-a")
    delivery.end(True)
    client = _Client(AT_ONCE, AT_ONCE)
    assert _get(client, "cmpl-a", token)[0] == 404, "nothing was captured"
    assert _get(client, "cmpl-a", "other") == _get(client, "cmpl-b.safetensors", token)
    assert _get(client, "cmpl-a", token, guarded=False)[0] == 403
    for query in ("index=1", "index=x", "timeout=61", "timeout=nan", "timeout=0"):
        assert _get(client, f"cmpl-a?{query}", token)[0] == 400
