"""What requests say of their capture: what is refused before an engine has them, and with which status."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tlcore.adapters.vllm.frontend import requests
from tlcore.adapters.vllm.frontend.deliveries import MARK, TokenMiddleware, delivery_of
from tlcore.adapters.vllm.frontend.requests import remember, storage_options
from tlcore.adapters.vllm.reports import VARIABLE, _modules_of
from tlcore.config.request import Allowed, _of_text

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
CACHES = [_of_text, _modules_of, requests._selects_any]
CHOICE = {"tlcore": {"deliver": True}}


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run that delivers, of which this process knows by itself."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shared"))
    monkeypatch.delenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", raising=False)
    remember({"config": {"delivery": True, "request_overrides": ["modules"]}})
    yield
    remember(None)
    requests._opened.clear()


def _answering(public_id: str, work: Callable[[], None]) -> None:
    """Do work as the answer to an HTTP request with this id."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["request_metadata"] = SimpleNamespace(request_id=public_id)
        work()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        pass

    asyncio.run(TokenMiddleware(app, lambda: True)({"type": "http"}, None, send))


def _params(**extra: Any) -> Any:
    return SimpleNamespace(extra_args=dict(extra), n=1)


def _engine() -> Any:
    """A class in the place of vLLM's, patched as that is."""

    class InputProcessor:
        def process_inputs(self, request_id: str, prompt: str, params: Any) -> Any:
            return SimpleNamespace(request_id=request_id, external_req_id=None, sampling_params=params)

        @staticmethod
        def assign_request_id(request: Any) -> None:
            request.external_req_id = request.request_id

    module: Any = ModuleType("processor")
    module.InputProcessor = InputProcessor
    requests.patch_input(module)
    return InputProcessor()


@pytest.mark.parametrize(
    ("choice", "parameter"),
    [
        ('{"enabled": false}', "use_beam_search"),
        ('{"deliver": true}', "use_beam_search"),
        ('{"modules": ["*.mlp"]}', "use_beam_search"),
        ('{"enabeld": false}', "tlcore.enabeld"),
        ('{"rows": "last"}', "tlcore.rows"),
    ],
)
@pytest.mark.parametrize("name", ["completion.CompletionRequest", "chat_completion.ChatCompletionRequest"])
def test_a_beam_search_with_a_choice_is_refused(name: str, choice: str, parameter: str) -> None:
    from importlib import import_module

    place, _, cls = name.partition(".")
    module = import_module(f"vllm.entrypoints.openai.{place}.protocol")
    requests.patch_bodies(module)
    given = {"prompt": "a"} if place == "completion" else {"messages": [{"role": "user", "content": "a"}]}
    ask = {**given, "model": "m", "use_beam_search": True}
    with pytest.raises(ValueError, match=rf"\$\.{parameter}: ") as told:
        getattr(module, cls)(**ask, vllm_xargs={"tlcore": choice}).to_beam_search_params(3, {})
    assert getattr(told.value, "parameter", None) == parameter
    for nothing in ({}, {"vllm_xargs": {"tlcore": '{"deliver": false}'}}):
        assert getattr(module, cls)(**ask, **nothing).to_beam_search_params(3, {}).max_tokens == 3


def test_what_many_requests_give_is_looked_up_once(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o700)
    allowed = Allowed(("modules",)).to_json()
    report = {"rank": 0, "allowed": allowed, "status": {"run_id": "r"}}
    (shared / f"{os.getpid()}_0.json").write_text(json.dumps(report))
    modules = shared / f"{os.getpid()}_0.modules"
    modules.write_text(json.dumps({"run_id": "r", "modules": [f"layers.{n}" for n in range(2000)]}))
    text = json.dumps({"modules": ["layers.*9", "layers.7"]})
    before = [each.cache_info().misses for each in CACHES]
    for _ in range(5):
        requests._check_given(_params(tlcore=text))
        requests._check_taken(_params(tlcore=text))
    assert [each.cache_info().misses for each in CACHES] == [before[0] + 1, before[1] + 1, before[2] + 2]
    for wrong in ("layers.*9x", "layer.7", "layers.*.*", ""):
        with pytest.raises(ValueError, match=r"\$\.tlcore\.modules\[0\]"):
            requests._check_taken(_params(tlcore={"modules": [wrong]}))
    modules.write_text(json.dumps({"run_id": "r", "modules": ["", "mlp"]}))
    requests._check_taken(_params(tlcore={"modules": ["_root", "*root", "mlp"]}))
    with pytest.raises(ValueError, match=r'"layers\.7" is no module that is captured'):
        requests._check_taken(_params(tlcore={"modules": ["layers.7"]}))


def test_where_ids_may_repeat_nothing_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")

    def work() -> None:
        for check in (requests._check_given, requests._check_taken):
            with pytest.raises(ValueError, match=r"\$\.tlcore\.deliver: .*VLLM_DISABLE_REQUEST_ID_RAND"):
                check(_params(**CHOICE))

    _answering("cmpl-a", work)


def test_the_mark_of_anothers_delivery_is_refused() -> None:
    stolen = []

    def steal(mark: str) -> None:
        with pytest.raises(ValueError, match=rf"\$\.{MARK}: no request may give this key"):
            _engine().process_inputs("cmpl-b", "", _params(**CHOICE, **{MARK: mark}))
        stolen.append(mark)

    def work() -> None:
        params = _params(**CHOICE)
        requests._check_given(params)
        mark = params.extra_args[MARK]
        thread = threading.Thread(target=lambda: _answering("cmpl-b", lambda: steal(mark)))
        thread.start()
        thread.join(60)
        assert stolen == [mark]
        steal("0" * 16)
        processor = _engine()
        taken = processor.process_inputs("cmpl-a-0", "", params)
        processor.assign_request_id(taken)
        delivery = delivery_of(params)
        assert delivery is not None and delivery._document["items"] == {"0": ["cmpl-a-0", 1]}
        with pytest.raises(Exception, match="two prompts with the number 0") as told:
            processor.assign_request_id(taken)
        assert getattr(told.value, "http_status", 409) == 409

    _answering("cmpl-a", work)


@pytest.mark.parametrize("check", [requests._check_given, requests._check_taken], ids=["body", "engine"])
def test_an_id_that_is_taken_is_a_conflict(check: Any) -> None:
    _answering("cmpl-a", lambda: check(_params(**CHOICE)))

    def work() -> None:
        with pytest.raises(Exception, match="can be fetched already") as told:
            check(_params(**CHOICE))
        assert getattr(told.value, "http_status", 409) == 409

    _answering("cmpl-a", work)


def test_a_full_disk_is_told_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work() -> None:
        with pytest.raises(Exception, match="nothing can be delivered here: No space left") as told:
            requests._check_given(_params(**CHOICE))
        assert getattr(told.value, "http_status", 503) == 503

    monkeypatch.setattr("json.dump", full)
    _answering("cmpl-a", work)


def _run_in(place: str, name: str) -> None:
    backend = {"name": "fsspec", "url": place, "storage_options": {"name": name}}
    remember({"config": {"backend": backend}})


def test_earlier_runs_are_opened_with_their_own_options() -> None:
    for place, name in (("s3://b/ab", "1"), ("s3://b/a/in", "2"), ("s3://b/a", "old"), ("s3://b/a", "3")):
        _run_in(place, name)
    remember(None)
    expected = {"s3://b/ab/r": "1", "s3://b/a/in/r": "2", "s3://b/a/r": "3", "s3://b/a": "3"}
    assert {url: (storage_options(url) or {})["name"] for url in expected} == expected
    assert storage_options("s3://b/abc/r") is None and storage_options("s3://b/r") is None


def test_the_last_16_runs_are_remembered() -> None:
    for number in range(17):
        _run_in(f"s3://b/{number}", str(number))
    assert storage_options("s3://b/0/r") is None and storage_options("s3://b/1/r") == {"name": "1"}
