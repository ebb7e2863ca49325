"""Clients fetch what was captured of their own requests, on a server that captures nothing else."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load

import tlcore
from tests.adapters.vllm.server import VllmServer, serving
from tests.models import tiny_llama
from tlcore.adapters.vllm.frontend.endpoint import ROOT_VARIABLE

pytestmark = pytest.mark.slow
KEY = "not-a-secret"
MLP = "model.layers.2.mlp/outputs"
CHOICE = {"deliver": True, "modules": ["model.layers.2.mlp"]}
PROMPT = [5, 6, 7, 8]


class Answer(NamedTuple):
    """What came back, and how long its first byte took."""

    status: int
    headers: Any
    body: bytes
    first_byte_s: float

    @property
    def json(self) -> dict[str, Any]:
        """The body."""
        found: dict[str, Any] = json.loads(self.body)
        return found


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dumps")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, dumps: Path) -> Iterator[VllmServer]:
    settings = {
        "model": str(tiny_llama()),
        "served-model-name": "tiny",
        "enforce-eager": True,
        "max-model-len": 128,
        "api-key": KEY,
        "no-enable-prefix-caching": True,
        "chat-template": "{{ messages[0]['content'] }}",
        "enable-log-requests": True,
        "intermediate-log-config": {
            "output_dir": str(dumps),
            "sample_rate": 0,
            "log_step_ids": [],
            "module_call_match": [r"layers\.[02]\.mlp$"],
            "request_overrides": ["modules", "rows"],
            "delivery": True,
            "backend": "safetensors",
        },
    }
    environment = {"VLLM_PLUGINS": "tlcore,tlcore.endpoint", ROOT_VARIABLE: str(dumps)}
    with serving(tmp_path_factory.mktemp("server"), settings, environment) as running:
        yield running


def _send(server: VllmServer, path: str, body: Any = None, **headers: str) -> Answer:
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    data = None if body is None else json.dumps(body).encode()
    begin = time.monotonic()
    try:
        answer = urllib.request.urlopen(urllib.request.Request(server.url + path, data, sent), timeout=90)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        first = answer.read(1)
        taken = time.monotonic() - begin
        return Answer(answer.status, answer.headers, first + answer.read(), taken)


def _complete(server: VllmServer, name: str, choice: Any = CHOICE, **more: Any) -> Answer:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "temperature": 0, **more}
    body["vllm_xargs"] = {"tlcore": json.dumps(choice)}
    return _send(server, "/v1/completions", body, **{"X-Request-Id": name})


def _fetch(server: VllmServer, name: str, token: str, query: str = "", **headers: str) -> Answer:
    return _send(server, f"/v1/tlcore/requests/{name}{query}", **{"X-Tlcore-Token": token, **headers})


def test_a_request_is_described_and_its_tensors_are_those_of_the_run(server: VllmServer, dumps: Path) -> None:
    answer = _complete(server, "one")
    token = answer.headers["X-Tlcore-Token"]
    assert answer.status == 200 and answer.json["id"] == "cmpl-one"
    whole = _fetch(server, "cmpl-one.safetensors", token)
    assert whole.status == 200, whole.body
    tensors = load(whole.body)
    assert {name.rpartition("/")[0] for name in tensors} == {"model.layers.2.mlp", ""}
    said = _fetch(server, "cmpl-one", token).json
    assert (said["id"], said["index"], said["prompt_length"]) == ("cmpl-one", 0, 4)
    assert said["token_ids"] == tensors["token_ids"].tolist() and said["token_ids"][:4] == PROMPT
    assert said["tensors"][MLP]["positions"] == list(range(6)) and not said["tensors"][MLP]["gaps"]
    assert said["tensors"][MLP]["shape"] == list(tensors[MLP].shape) and len(tensors[MLP]) == 6
    run = tlcore.open_run(said["run"])
    assert Path(said["run"]).parent == dumps and said["steps"] == run.request("one").steps
    assert (run.request("one")[f"{MLP}_cpu"] == tensors[MLP]).all()


def test_only_the_answers_token_opens_it_and_only_behind_the_key(server: VllmServer) -> None:
    mine, other = (_complete(server, name).headers["X-Tlcore-Token"] for name in ("mine", "other"))
    wrong = [_fetch(server, "cmpl-mine", token) for token in (other, "", mine[:-1])]
    unknown = _fetch(server, "cmpl-nobody", mine)
    for answer in (*wrong, unknown):
        assert answer.status == 404 and answer.json["error"]["message"] == unknown.json["error"]["message"]
    assert _fetch(server, "cmpl-mine", mine, Authorization="Bearer wrong").status == 401
    assert _fetch(server, "cmpl-mine", mine).status == 200
    log = server.log.read_text()
    assert mine not in log and other not in log


def test_an_id_that_can_be_fetched_already_is_refused(server: VllmServer) -> None:
    first = _complete(server, "twice")
    again = _complete(server, "twice")
    assert (first.status, again.status) == (200, 409) and "X-Tlcore-Token" not in again.headers
    assert "'cmpl-twice'" in again.json["error"]["message"]
    assert _fetch(server, "cmpl-twice", first.headers["X-Tlcore-Token"]).status == 200


def test_prompts_and_samples_are_told_apart_by_index(server: VllmServer) -> None:
    prompts = [[5, 6], [7, 8, 9]]
    answer = _complete(server, "many", prompt=prompts, n=2, temperature=1)
    token = answer.headers["X-Tlcore-Token"]
    assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2, 3]
    for index in range(4):
        said = _fetch(server, "cmpl-many", token, f"?index={index}").json
        assert said["token_ids"][: said["prompt_length"]] == prompts[index // 2]
        assert (
            len(load(_fetch(server, "cmpl-many.safetensors", token, f"?index={index}").body)["token_ids"]) > 3
        )
    for wrong in ("4", "-1", "x"):
        refused = _fetch(server, "cmpl-many", token, f"?index={wrong}")
        assert refused.status == 400 and "$.index" in refused.json["error"]["message"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_streamed_answer_carries_its_token_in_the_header(server: VllmServer, chat: bool) -> None:
    name = f"streamed-{chat}"
    if chat:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 3}
        body |= {"stream": True, "vllm_xargs": {"tlcore": json.dumps(CHOICE)}}
        answer = _send(server, "/v1/chat/completions", body, **{"X-Request-Id": name})
    else:
        answer = _complete(server, name, stream=True)
    first = json.loads(answer.body.split(b"data: ")[1])
    found = _fetch(server, f"{first['id']}.safetensors", answer.headers["X-Tlcore-Token"])
    assert found.status == 200 and len(load(found.body)[MLP]) >= 1


def test_many_at_once_get_their_own_soon_after_the_answer(server: VllmServer) -> None:
    def one(number: int) -> float:
        answer = _complete(server, f"load{number}", prompt=[9, 10 + number], max_tokens=8)
        found = _fetch(server, f"cmpl-load{number}.safetensors", answer.headers["X-Tlcore-Token"])
        assert load(found.body)["token_ids"].tolist()[:2] == [9, 10 + number]
        return found.first_byte_s

    alone = sorted(one(100 + number) for number in range(9))
    with ThreadPoolExecutor(16) as pool:
        together = sorted(pool.map(one, range(16)))
    shown = f"{alone[4]:.3f} s ({alone[0]:.3f} to {alone[-1]:.3f}), one of 16 {together[8]:.3f} s"
    sys.stdout.write(f"first byte after the answer: {shown}\n")
    # Without a flush of its own it would wait for the commit, a second after the step.
    assert alone[0] < 0.9


def test_zstd_and_nothing_else_is_compressed(server: VllmServer) -> None:
    zstandard = pytest.importorskip("zstandard")
    token = _complete(server, "packed").headers["X-Tlcore-Token"]
    plain = _fetch(server, "cmpl-packed.safetensors", token, **{"Accept-Encoding": "gzip"})
    packed = _fetch(server, "cmpl-packed.safetensors", token, **{"Accept-Encoding": "zstd"})
    assert plain.headers["Content-Encoding"] is None and packed.headers["Content-Encoding"] == "zstd"
    assert zstandard.ZstdDecompressor().decompress(packed.body) == plain.body
    assert load(plain.body)[MLP].shape[0] == 6


def test_what_is_not_allowed_or_forged_is_refused_and_others_have_no_token(server: VllmServer) -> None:
    forged = {"tlcore_delivery": "x"}
    for extra, key in (({"tlcore": '{"deliver": 1}'}, "tlcore.deliver"), (forged, "tlcore_delivery")):
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "vllm_xargs": extra}
        answer = _send(server, "/v1/completions", body)
        assert answer.status == 400 and answer.json["error"]["param"] == key
    for choice in ({}, {"rows": "last"}, {"enabled": False, "deliver": True}):
        answer = _complete(server, "none", choice)
        assert answer.status == 200, answer.body
        token = answer.headers["X-Tlcore-Token"]
        if token is not None:
            assert _fetch(server, "cmpl-none", token).status == 404
    assert _complete(server, "bad", {"deliver": True, "rows": "?"}).status == 400
    assert _complete(server, "bad", {"deliver": True}, max_tokens=-1).status == 400
    assert _complete(server, "bad", {"deliver": True}).status == 200
