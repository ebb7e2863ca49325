"""Tokens of requests that are fetched: who gets one, what it opens, and what is kept of it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tlcore.adapters.vllm.frontend import deliveries
from tlcore.adapters.vllm.frontend.deliveries import (
    HEADER,
    MARK,
    Asked,
    TakenError,
    TokenMiddleware,
    delivery_of,
    find_delivery,
    mark_delivery,
)
from tlcore.adapters.vllm.reports import VARIABLE
from tlcore.errors import CaptureError, ConfigError


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shared"))
    return tmp_path / "shared"


def _params() -> Any:
    return SimpleNamespace(extra_args={"tlcore": {"deliver": True}})


def _answer(
    public_id: str, *statuses: int, prompts: int = 1, delivers: bool = True, leaves: bool = False
) -> tuple[list[Any], list[Any]]:
    """What a server sends that makes sampling parameters for some prompts, and these."""
    sent: list[Any] = []
    made: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["request_metadata"] = SimpleNamespace(request_id=public_id)
        for number in range(prompts):
            params = _params()
            mark_delivery(params)
            delivery = delivery_of(params)
            assert delivery is not None
            delivery.add(f"{public_id}-{number}-0123abcd", f"{public_id}-{number}", 2)
            made.append(params)
        if leaves:
            assert await receive() == {"type": "http.disconnect"}
        for status in statuses:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"..."})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    middleware = TokenMiddleware(app, lambda: delivers)
    asyncio.run(middleware({"type": "http"}, receive, send))
    return sent, made


def _token(sent: list[Any]) -> str:
    ((_, token),) = [each for each in sent[0]["headers"] if each[0] == HEADER.lower().encode()]
    return str(token.decode())


def test_the_answer_carries_a_token_that_opens_its_request_and_no_other(directory: Path) -> None:
    tokens = {name: _token(_answer(name, 200, prompts=2)[0]) for name in ("cmpl-a", "cmpl-b")}
    found = find_delivery("cmpl-a", tokens["cmpl-a"])
    assert found is not None and found["answered"]
    assert found["items"] == {"0": ["cmpl-a-0-0123abcd", 2], "1": ["cmpl-a-1-0123abcd", 2]}
    for name, token in (
        ("cmpl-a", tokens["cmpl-b"]),
        ("cmpl-a", ""),
        ("cmpl-c", tokens["cmpl-a"]),
        ("cmpl-a", "é"),
    ):
        assert find_delivery(name, token) is None
    assert min(map(len, tokens.values())) >= 43


def test_nothing_of_a_token_is_kept_and_nobody_else_reads_the_files(directory: Path) -> None:
    token = _token(_answer("cmpl-a", 200)[0])
    (path,) = directory.iterdir()
    assert token not in path.read_text() and token not in path.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_an_id_is_taken_until_its_request_has_failed(directory: Path) -> None:
    _answer("cmpl-a", 200)
    with pytest.raises(TakenError, match="'cmpl-a'"):
        _answer("cmpl-a", 200)
    sent, _ = _answer("cmpl-b", 400)
    assert sent[0]["headers"] == []
    _answer("cmpl-b", 200)


def test_old_ones_are_forgotten(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "_MOST_KEPT", 2)
    monkeypatch.setattr(deliveries, "_LOOK_EVERY", 1)
    for name in "abcd":
        _answer(name, 200)
    assert len(list(directory.iterdir())) == 2
    monkeypatch.setattr(deliveries, "_KEPT_S", -1.0)
    _answer("e", 200)
    assert len(list(directory.iterdir())) == 1


def test_looking_for_old_ones_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(deliveries, "_forget_old", lambda: looked.append(1))
    for number in range(deliveries._LOOK_EVERY):
        _answer(f"cmpl-{number}", 400)
    assert len(looked) == 1


def test_after_an_hour_a_request_is_not_there_and_its_id_is_free(directory: Path) -> None:
    token = _token(_answer("cmpl-a", 200)[0])
    (path,) = directory.iterdir()
    os.utime(path, (time.time() - 3590,) * 2)
    assert find_delivery("cmpl-a", token) is not None
    os.utime(path, (time.time() - 3601,) * 2)
    assert find_delivery("cmpl-a", token) is None
    assert find_delivery("cmpl-a", _token(_answer("cmpl-a", 200)[0])) is not None


@pytest.mark.parametrize("status", [200, 400])
def test_one_that_ends_after_it_was_forgotten_leaves_the_next_of_its_id(directory: Path, status: int) -> None:
    first = Asked({"state": {"request_metadata": SimpleNamespace(request_id="cmpl-a")}})
    forgotten = first.deliver()
    (path,) = directory.iterdir()
    path.unlink()
    token = _token(_answer("cmpl-a", 200)[0])
    forgotten.end(status == 200)
    assert find_delivery("cmpl-a", token) is not None


def test_a_place_is_taken_once(directory: Path) -> None:
    delivery = Asked({"state": {"request_metadata": SimpleNamespace(request_id="cmpl-a")}}).deliver()
    delivery.add("cmpl-a-0-0123abcd", "cmpl-a-0", 1)
    with pytest.raises(TakenError, match="number 0"):
        delivery.add("cmpl-a-0-deadbeef", "cmpl-a-0", 1)


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_and_the_id_stays_free(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(json, "dump", _full)
        with pytest.raises(CaptureError, match="nothing can be delivered here: No space left"):
            _answer("cmpl-a", 200)
    assert list(directory.iterdir()) == []
    assert find_delivery("cmpl-a", _token(_answer("cmpl-a", 200)[0])) is not None


def test_a_disk_that_fills_while_it_is_answered_disturbs_no_answer(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = json.dump

    def dump(document: Any, file: Any) -> None:
        (written if not document["items"] else _full)(document, file)

    monkeypatch.setattr(json, "dump", dump)
    # vLLM's loggers do not hand on what they are told.
    told: list[str] = []
    monkeypatch.setattr(deliveries.log, "error", lambda text, *given: told.append(text % given))
    sent, _ = _answer("cmpl-a", 200)
    assert sent[0]["status"] == 200 and find_delivery("cmpl-a", _token(sent)) is None
    assert list(directory.iterdir()) == []
    assert told == ["the request cmpl-a cannot be fetched: No space left on device"]


def test_a_mark_of_no_delivery_is_none() -> None:
    _, (params,) = _answer("cmpl-a", 200)
    assert delivery_of(params) is None, "the answer is complete"
    assert delivery_of(SimpleNamespace(extra_args={MARK: ["x"]})) is None
    assert delivery_of(SimpleNamespace(extra_args=None)) is None


def test_elsewhere_nothing_is_delivered() -> None:
    for ask in (lambda: mark_delivery(_params()), lambda: _answer("cmpl-a", 200, delivers=False)):
        with pytest.raises(ConfigError, match=r"\$\.tlcore\.deliver: only a server"):
            ask()
    with pytest.raises(ConfigError, match="completions, chat and responses"):
        Asked({"type": "http"}).deliver()


def test_the_files_are_json_of_few_things(directory: Path) -> None:
    _answer("cmpl-a", 200)
    (path,) = directory.iterdir()
    assert set(json.loads(path.read_text())) == {"id", "token", "answered", "items"}


def test_an_id_whose_client_left_before_the_answer_is_free(directory: Path) -> None:
    _answer("cmpl-a", 200, leaves=True)
    assert not list(directory.glob("*.delivery"))
    assert find_delivery("cmpl-a", _token(_answer("cmpl-a", 200)[0])) is not None
