"""The route that requests are fetched by, on an app of its own: which status stands for what."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tlcore.adapters.vllm.frontend import deliveries, fetching_route
from tlcore.adapters.vllm.frontend.deliveries import HEADER, Asked, Delivery
from tlcore.adapters.vllm.frontend.endpoint import EndpointPlugin
from tlcore.adapters.vllm.reports import VARIABLE

NEVER, AT_ONCE = 10**6, 1
# A message that does not come while the request is answered.
_LATER_S = 600


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shared"))
    monkeypatch.setattr(deliveries, "_here", {})
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
    sent = _sent(client, path, token, guarded)
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]


def _sent(client: Any, path: str, token: str, guarded: bool = True, leaves: bool = False) -> list[Any]:
    """What the server sends; of a client that ``leaves``, once that is known."""
    from fastapi import FastAPI

    app, sent = FastAPI(), list[Any]()
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

    messages = [{"type": "http.request", "body": b""}] + [{"type": "http.disconnect"}] * leaves

    async def receive() -> Any:
        if not messages:
            await asyncio.sleep(_LATER_S)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


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
    for query in ("index=1", "index=x", "timeout=61", "timeout=nan", "timeout=0", "index=0&index=0"):
        assert _get(client, f"cmpl-a?{query}", token)[0] == 400
    # Answered all the same, it would be with the first choice.
    status, error = _get(client, "cmpl-a?indx=1", token)
    assert status == 400 and error["message"] == '$.indx: unknown key. Did you mean "index"?'


def test_who_leaves_is_waited_for_no_more() -> None:
    delivery, token = _delivery("cmpl-a")
    for ended in (False, True):
        # With these ranks either would take a minute.
        sent = _sent(_Client(NEVER, NEVER), "cmpl-a?timeout=60", token, leaves=True)
        assert sent[0]["status"] == 499, ended
        delivery.end(True)


class _Looks:
    """Counts how often somebody looks for a delivery."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = deliveries.find_delivery

        def find(*given: Any) -> Any:
            self.count += 1
            return original(*given)

        monkeypatch.setattr(fetching_route, "find_delivery", find)


WAITING = 100


@pytest.mark.parametrize("here", [True, False], ids=["of this process", "of another"])
def test_many_who_wait_for_an_answer_hardly_look(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery, token = _delivery("cmpl-a")
    if not here:
        monkeypatch.setattr(deliveries, "_here", {})
    looks = _Looks(monkeypatch)

    async def wait_all() -> list[Any]:
        deadline = time.monotonic() + 60
        waiting = [
            asyncio.create_task(fetching_route._answered("cmpl-a", token, deadline)) for _ in range(WAITING)
        ]
        await asyncio.sleep(1)
        assert not any(each.done() for each in waiting)
        deliveries._end(delivery, good=True)
        return await asyncio.gather(*waiting)

    begin = time.monotonic()
    found = asyncio.run(wait_all())
    assert all(each["answered"] for each in found) and len(found) == WAITING
    # Two each where they are woken; else those of the first second, and five in each further one.
    assert looks.count <= WAITING * (2 if here else 20 + 5 * (time.monotonic() - begin))
