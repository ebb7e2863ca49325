"""Capture controlled over HTTP on a running server, behind its API key, and what Prometheus sees of it."""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.server import VllmServer, serving
from tests.models import tiny_llama
from tlcore.adapters.vllm.frontend.endpoint import (
    DELIVERY_VARIABLE,
    INJECT_VARIABLE,
    ROOT_VARIABLE,
    SPILL_VARIABLE,
    EndpointPlugin,
    ForbiddenError,
    restricted,
)
from tlcore.adapters.vllm.frontend.status import Status, merged
from tlcore.errors import ConfigError

KEY = "not-a-secret"
METRIC = re.compile(r'^tlcore_(\w+?)(?:_total)?\{rank="0"\} (\S+)$', re.MULTILINE)


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("captured")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, output_dir: Path) -> Iterator[VllmServer]:
    settings = {
        "model": str(tiny_llama()),
        "served-model-name": "tiny",
        "enforce-eager": True,
        "max-model-len": 256,
        "api-key": KEY,
    }
    environment = {"VLLM_PLUGINS": "tlcore,tlcore.endpoint", ROOT_VARIABLE: str(output_dir)}
    with serving(tmp_path_factory.mktemp("server"), settings, environment) as running:
        yield running


def _complete(server: VllmServer, request_id: str, tokens: int = 3) -> None:
    prompt = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": tokens, "ignore_eos": True}
    status, answer = server.ask("/v1/completions", prompt, KEY, X_Request_Id=request_id)
    assert status == 200, answer


def _metrics(server: VllmServer) -> dict[str, float]:
    return {name: float(value) for name, value in METRIC.findall(server.text("/metrics"))}


@pytest.mark.slow
def test_a_server_is_captured_from_start_to_stop(server: VllmServer, output_dir: Path) -> None:
    _complete(server, "BEFORE")
    assert server.ask("/v1/tlcore/status", key=KEY)[1]["state"] == "idle"

    status, started = server.ask("/v1/tlcore/start", {"log_step_ids": [0, 2], "backend": "safetensors"}, KEY)
    assert (status, started["state"]) == (200, "running"), started
    assert Path(started["url"]).parent == output_dir
    _complete(server, "AAA")
    status, second = server.ask("/v1/tlcore/start", {}, KEY)
    assert status == 409 and started["url"] in second["error"]["message"]

    status, stopped = server.ask("/v1/tlcore/stop", b"", KEY)
    assert (status, stopped["state"], stopped["problem"]) == (200, "closed", None)
    run = tlcore.open_run(started["url"])
    assert (run.state, run.steps) == ("complete", [0, 2])
    assert stopped["ledger"] == run.ledger.to_json() and run.ledger.stored > 100
    request = run.request("AAA")
    rows = request["model.layers.3.mlp/outputs_cpu"]
    assert request.positions("model.layers.3.mlp/outputs_cpu") == [*range(rows.shape[0] - 1), rows.shape[0]]
    assert server.ask("/v1/tlcore/status", key=KEY)[1] == stopped


@pytest.mark.slow
def test_prometheus_counts_over_all_captures(server: VllmServer) -> None:
    before = defaultdict(float, _metrics(server))
    assert server.ask("/v1/tlcore/start", {"module_call_match": "mlp$"}, KEY)[0] == 200
    started = _metrics(server)
    assert (started["running"], started["captured_tensors"]) == (1, before["captured_tensors"])
    _complete(server, "BBB")
    _, stopped = server.ask("/v1/tlcore/stop", b"", KEY)
    ledger = stopped["ledger"]
    assert ledger["captured"] == ledger["stored"] == 8
    found = _metrics(server)
    assert found["running"] == 0
    assert found["stored_tensors"] == before["stored_tensors"] + 8
    assert found["captured_bytes"] == before["captured_bytes"] + ledger["bytes_captured"]
    assert found["stored_bytes"] == before["stored_bytes"] + ledger["bytes_stored"]
    assert (found["dropped_tensors"], found["failed_tensors"], found["queue_bytes"]) == (0, 0, 0)
    assert found["blocked_seconds"] >= 0
    assert "vllm:num_requests_running" in server.text("/metrics")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"log_step_ids": "first"}, 400, r"\$\.log_step_ids"),
        (b"{", 400, "not JSON"),
        ([], 400, "JSON object"),
        (b'{"rows": ' + b"[" * 600 + b"]" * 600 + b"}", 400, "more than 32 levels deep"),
        ({"module_call_match": r"(\w+\.?)+\d!"}, 400, r"\$\.module_call_match\[0\]: the pattern takes more"),
        ({"output_dir": "/tmp/elsewhere"}, 403, "below the operator's"),
        ({"backend": "tests.sinks:MemorySink"}, 403, "not by an import path"),
    ],
)
def test_what_may_not_be_started_is_refused(server: VllmServer, body: Any, status: int, message: str) -> None:
    found, answer = server.ask("/v1/tlcore/start", body, KEY)
    assert found == status and re.search(message, answer["error"]["message"]), answer
    assert server.ask("/v1/tlcore/status", key=KEY)[1]["state"] != "running"


@pytest.mark.slow
def test_without_the_key_nothing_is_answered(server: VllmServer) -> None:
    for key in (None, "wrong"):
        assert server.ask("/v1/tlcore/status", key=key)[0] == 401
        assert server.ask("/v1/tlcore/start", {}, key)[0] == 401


@pytest.mark.slow
def test_sigterm_completes_a_run_that_nobody_stopped(server: VllmServer) -> None:
    """The last test of this server: it ends it."""
    _, started = server.ask("/v1/tlcore/start", {}, KEY)
    _complete(server, "CCC")
    server.end()
    run = tlcore.open_run(started["url"])
    assert (run.state, run.steps) == ("complete", [0]), server.watched.tail()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "root"))
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_a_place_is_given_where_none_is_asked_for(root: Path) -> None:
    assert restricted({}).output_dir == str(root)
    assert restricted({"output_dir": str(root / "x")}).output_dir == str(root / "x")


def test_a_place_cannot_be_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "link").symlink_to(root.parent)
    outside = [f"{root}/../x", f"{root}-other", str(root / "link"), "s3://bucket/x", f"file://{root}"]
    for place in outside:
        with pytest.raises(ForbiddenError, match=r"\$\.output_dir"):
            restricted({"output_dir": place})
    monkeypatch.setenv(ROOT_VARIABLE, "s3://bucket/runs")
    assert restricted({"backend": "safetensors"}).output_dir == "s3://bucket/runs"
    for place in (
        "s3://bucket/runs/../x",
        "s3://bucket/runs2",
        "s3://bucket",
        str(root),
        "s3://bucket/runs/%2e",
    ):
        with pytest.raises(ForbiddenError, match=r"\$\.output_dir"):
            restricted({"output_dir": place})


def test_where_blobs_wait_is_the_operators(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPILL_VARIABLE, raising=False)
    with pytest.raises(ForbiddenError, match=r"\$\.spill_dir: .*TLCORE_ENDPOINT_SPILL_DIR"):
        restricted({"spill_dir": str(root / "spill")})
    assert restricted({"spill_dir": None}).spill_dir is None
    monkeypatch.setenv(SPILL_VARIABLE, "/var/spill")
    assert restricted({"backend": "safetensors"}).spill_dir == "/var/spill"


def test_a_home_is_no_place_below_the_directory_of_the_server(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(INJECT_VARIABLE, str(root))
    with pytest.raises(ForbiddenError, match=ROOT_VARIABLE):
        restricted({"output_dir": "~/runs"})
    with pytest.raises(ForbiddenError, match=INJECT_VARIABLE):
        restricted({"inject": {"run": "~/runs/one", "modules": ["mlp"]}})
    assert restricted({"output_dir": "runs"}).output_dir == "runs"
    monkeypatch.setenv(ROOT_VARIABLE, "~/runs")
    assert restricted({"output_dir": str(tmp_path / "home" / "runs" / "a")})
    with pytest.raises(ForbiddenError, match=ROOT_VARIABLE):
        restricted({"output_dir": "runs"})


def test_code_and_credentials_are_the_operators(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForbiddenError, match="import path"):
        restricted({"backend": {"name": "os:system"}})
    monkeypatch.setenv(ROOT_VARIABLE, "s3://bucket/runs")
    backend = {"name": "fsspec", "url": "s3://bucket/runs/a", "storage_options": {"endpoint_url": "http://x"}}
    with pytest.raises(ForbiddenError, match=r"\$\.backend\.storage_options"):
        restricted({"backend": backend})


@pytest.mark.slow
def test_a_server_without_a_key_or_an_engine_refuses() -> None:
    import asyncio

    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    for key, engine_problem in (([], "no API key"), (["key"], "no engine")):
        app, plugin = FastAPI(), EndpointPlugin()
        plugin.attach_router(app)
        asyncio.run(plugin.init_state(None, app.state, Namespace(api_key=key)))
        answer = TestClient(app).get("/v1/tlcore/status")
        assert engine_problem in answer.json()["error"]["message"]
        assert answer.status_code == (409 if key else 403)


@pytest.mark.slow
def test_no_client_sees_the_credentials_in_the_operators_place(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    import asyncio

    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    async def ask(method: str, *args: Any) -> Status:
        url = "ftp://user:secret@host/runs/one"
        return merged([{"rank": 0, "state": "running", "run_id": "one", "url": url}])

    app, plugin = FastAPI(), EndpointPlugin()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(object(), app.state, Namespace(api_key=["key"])))
    monkeypatch.setattr(plugin, "_ask", ask)
    client = TestClient(app)
    answers = [client.get("/v1/tlcore/status"), client.post("/v1/tlcore/start", json={})]
    answers.append(client.post("/v1/tlcore/stop"))
    assert [each.status_code for each in answers] == [200, 409, 200]
    for answer in answers:
        assert "@host/runs/one" in answer.text and "secret" not in answer.text


def test_injecting_takes_the_operators_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(run: str) -> dict[str, Any]:
        return {"inject": {"run": run, "modules": ["mlp"], "serve": True}}

    monkeypatch.delenv(INJECT_VARIABLE, raising=False)
    with pytest.raises(ForbiddenError, match=INJECT_VARIABLE):
        restricted(asked(str(tmp_path / "runs" / "one")))
    monkeypatch.setenv(INJECT_VARIABLE, str(tmp_path / "runs"))
    for outside in (tmp_path, tmp_path / "runs" / ".." / "other", "s3://bucket/run", "memory://run"):
        with pytest.raises(ForbiddenError, match=INJECT_VARIABLE):
            restricted(asked(str(outside)))
    found = restricted(asked(str(tmp_path / "runs" / "one"))).inject
    assert found is not None and found.modules == ("mlp",)


def test_delivery_takes_the_operators_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DELIVERY_VARIABLE, raising=False)
    with pytest.raises(ForbiddenError, match=DELIVERY_VARIABLE):
        restricted({"delivery": True})
    assert not restricted({"delivery": False}).delivery
    monkeypatch.setenv(DELIVERY_VARIABLE, "1")
    assert restricted({"delivery": True}).delivery


def test_no_client_makes_the_patterns_of_requests_costly(root: Path) -> None:
    for cheap in (["^cmpl-a", "b$"], "x-[0-9]+-", [f"id-{number}" for number in range(1000)]):
        assert restricted({"request_ids": cheap}).request_ids
    hidden = ("(?x)(a) +", "(?#[)(a+)+$(?#])", r"\(?" * 20)
    for costly in ("(a+)+$", "(ab|ab)" * 30, "a?" * 20, ".*.*.*", *hidden, ["a+b+"] * 3):
        with pytest.raises(ConfigError, match=r"\$\.request_ids: over HTTP patterns of requests repeat no"):
            restricted({"request_ids": costly})
