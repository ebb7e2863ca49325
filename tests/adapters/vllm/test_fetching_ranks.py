"""What is fetched of an engine of two ranks, and of two engines behind two API servers."""

from __future__ import annotations

import http.client
import importlib
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load

import tlcore
from tests.adapters.vllm import late_sink
from tests.adapters.vllm.client import KEY, complete, delivering, fetch
from tests.adapters.vllm.helpers import SEVERAL_RANKS
from tests.adapters.vllm.server import VllmServer, serving
from tests.models import tiny_llama
from tests.waiting import wait_until
from tlcore.registry import resolve

pytestmark = [pytest.mark.slow, pytest.mark.deep]
QKV = "model.layers.2.self_attn.qkv_proj/outputs_0"
CHOICE = {"deliver": True, "modules": ["*qkv_proj"]}
_TWO_ENGINES = {"data-parallel-size": 2, "api-server-count": 2}
# The flags of each server, and keys of its capture.
SERVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor parallel": ({"tensor-parallel-size": 2}, {}),
    "two engines, two API servers": (_TWO_ENGINES, {}),
    "two engines, int8": (_TWO_ENGINES, {"store_dtype": "int8"}),
}


class _Running(NamedTuple):
    server: VllmServer
    dumps: Path
    # While it lies there, rank 1 stores nothing.
    late: Path


@pytest.fixture(scope="module", params=SERVERS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Running]:
    directory = tmp_path_factory.mktemp("server")
    flags, keys = SERVERS[request.param]
    module = r"layers\.2\.self_attn\.qkv_proj$"
    settings = delivering(directory / "dumps", module, backend=late_sink.NAME, **keys) | flags
    late = directory / "late"
    environment = {**SEVERAL_RANKS, "VLLM_PLUGINS": "tlcore,tlcore.endpoint", late_sink.VARIABLE: str(late)}
    with serving(directory, settings, environment) as server:
        yield _Running(server, directory / "dumps", late)


def test_each_fetches_its_own_whole_rows_from_whoever_answers(running: _Running) -> None:
    prompts = {f"own{number}": [9, 10 + number, *range(3, 3 + number)] for number in range(12)}

    def one(name: str) -> list[bytes]:
        answer = complete(running.server, name, CHOICE, prompt=prompts[name])
        assert answer.status == 200, answer.body
        for wrong in (answer.token[:-1], ""):
            assert fetch(running.server, f"cmpl-{name}", wrong).status == 404
        told = [fetch(running.server, f"cmpl-{name}.safetensors", answer.token) for _ in range(4)]
        assert [each.status for each in told] == [200] * 4, told[0].body
        return [each.body for each in told]

    with ThreadPoolExecutor(12) as pool:
        fetched = dict(zip(prompts, pool.map(one, prompts), strict=True))
    (directory,) = running.dumps.iterdir()
    # An import path in a run is followed where this process was given the same.
    resolve(late_sink.NAME)
    run = tlcore.open_run(directory)
    for name, bodies in fetched.items():
        assert len(set(bodies)) == 1
        tensors = load(bodies[0])
        assert tensors["token_ids"].tolist()[: len(prompts[name])] == prompts[name]
        request = run.request(f"cmpl-{name}-0")
        (stored,) = {each for each in request.names if each.startswith(QKV) and "rank_1" not in each} or {
            each for each in request.names if each.startswith(QKV)
        }
        assert torch.equal(tensors[QKV], request.tensor(stored, unshard=True))
        # Of both ranks' heads: 4 query and 2 key and value heads each of the tiny model.
        assert tensors[QKV].shape == (len(prompts[name]) + 2, tiny_width())


def tiny_width() -> int:
    """How many columns the joined projection has."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(tiny_llama())
    size = config.hidden_size // config.num_attention_heads
    return int(size * (config.num_attention_heads + 2 * config.num_key_value_heads))


def test_a_duplicate_is_refused_and_an_index_is_understood_by_whichever_api_server(running: _Running) -> None:
    prompts = [[5, 6], [7, 8, 9]]
    first = complete(running.server, "many", CHOICE, prompt=prompts, n=2, temperature=1)
    assert first.status == 200
    for _ in range(6):
        again = complete(running.server, "many", CHOICE)
        assert again.status == 409 and not again.token
    for index in (0, 1, 2, 3) * 2:
        said = fetch(running.server, "cmpl-many", first.token, f"?index={index}").json
        assert said["token_ids"][: said["prompt_length"]] == prompts[index // 2]
        assert said["tensors"][QKV]["shape"][0] == len(prompts[index // 2]) + 2


def test_a_rank_that_is_late_is_named_and_keeps_nobody_from_answers(running: _Running) -> None:
    running.late.touch()
    try:
        tokens = {}
        for number in range(4):
            answer = complete(running.server, f"late{number}", CHOICE)
            assert answer.status == 200
            tokens[f"cmpl-late{number}"] = answer.token
        late = fetch(running.server, "cmpl-late0", tokens["cmpl-late0"], "?timeout=3")
        for name, token in tokens.items():
            _leave_while_waiting(running.server, name, token)
        assert complete(running.server, "meanwhile", CHOICE).status == 200
    finally:
        running.late.unlink()
    # A rank that has stored all may be one that this request has no rows of.
    assert late.status == 504 and "ranks [1] have not stored" in late.json["error"]["message"], late.body
    for name, token in tokens.items():
        found = fetch(running.server, f"{name}.safetensors", token)
        assert found.status == 200 and len(load(found.body)[QKV]) == 6
    wait_until(running.server.ready, "the server answers", 60)


def test_a_worker_that_is_stopped_is_named_and_its_part_is_there_when_it_goes_on(running: _Running) -> None:
    running.late.touch()
    worker = _of_rank_1(running.server)
    try:
        answer = complete(running.server, "stopped", CHOICE)
        assert answer.status == 200
        worker.suspend()
        late = fetch(running.server, "cmpl-stopped", answer.token, "?timeout=3")
        again = fetch(running.server, "cmpl-stopped.safetensors", answer.token, "?timeout=1")
        assert running.server.ready()
    finally:
        running.late.unlink()
        worker.resume()
    for told in (late, again):
        assert told.status == 504 and "ranks [1] have not stored" in told.json["error"]["message"], told.body
    found = fetch(running.server, "cmpl-stopped.safetensors", answer.token)
    assert found.status == 200 and len(load(found.body)[QKV]) == 6
    assert complete(running.server, "went-on", CHOICE).status == 200


def _of_rank_1(server: VllmServer) -> Any:
    """The process that computes as rank 1: a worker of tensor parallelism, or the second engine."""
    psutil = importlib.import_module("psutil")
    (found,) = {
        each
        for each in psutil.Process(server.process.pid).children(recursive=True)
        if any(name in " ".join(each.cmdline()) for name in ("Worker_TP1", "EngineCore_DP1"))
    }
    return found


def _leave_while_waiting(server: VllmServer, name: str, token: str) -> None:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", "X-Tlcore-Token": token}
    connection.request("GET", f"/v1/tlcore/requests/{name}.safetensors", headers=headers)
    connection.close()
