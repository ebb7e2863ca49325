"""Clients fetch what was captured of their own requests, on a server that captures nothing else."""

from __future__ import annotations

import http.client
import json
import sys
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

import tlcore
from tests.adapters.vllm.client import (
    BACKEND,
    CHOICE,
    KEY,
    MLP,
    MODULES,
    PROMPT,
    Answer,
    complete,
    delivering,
    fetch,
    send,
)
from tests.adapters.vllm.server import FEWER_PROCESSES, VllmServer, serving
from tests.waiting import wait_until
from tlcore.adapters.vllm.frontend.endpoint import DELIVERY_VARIABLE, ROOT_VARIABLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dumps")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, dumps: Path) -> Iterator[VllmServer]:
    settings = delivering(dumps, MODULES) | {
        "chat-template": "{{ messages[0]['content'] }}",
        "enable-log-requests": True,
    }
    environment = {"VLLM_PLUGINS": "tlcore,tlcore.endpoint", ROOT_VARIABLE: str(dumps)}
    environment |= {"VLLM_ENABLE_RESPONSES_API_STORE": "1", DELIVERY_VARIABLE: "1", **FEWER_PROCESSES}
    with serving(tmp_path_factory.mktemp("server"), settings, environment) as running:
        yield running


def test_a_request_is_described_and_its_tensors_are_those_of_the_run(server: VllmServer, dumps: Path) -> None:
    answer = complete(server, "one")
    token = answer.token
    assert answer.status == 200 and answer.json["id"] == "cmpl-one"
    whole = fetch(server, "cmpl-one.safetensors", token)
    assert whole.status == 200, whole.body
    tensors = load(whole.body)
    assert {name.rpartition("/")[0] for name in tensors} == {"model.layers.2.mlp", ""}
    said = fetch(server, "cmpl-one", token).json
    assert (said["id"], said["index"], said["prompt_length"]) == ("cmpl-one", 0, 4)
    assert said["token_ids"] == tensors["token_ids"].tolist() and said["token_ids"][:4] == PROMPT
    assert said["tensors"][MLP]["positions"] == list(range(6)) and not said["tensors"][MLP]["gaps"]
    assert said["tensors"][MLP]["shape"] == list(tensors[MLP].shape) and len(tensors[MLP]) == 6
    run = tlcore.open_run(said["run"])
    assert Path(said["run"]).parent == dumps and said["steps"] == run.request("one").steps
    assert (run.request("one")[f"{MLP}_cpu"] == tensors[MLP]).all()


def test_only_the_answers_token_opens_it_and_only_behind_the_key(server: VllmServer) -> None:
    mine, other = (complete(server, name).token for name in ("mine", "other"))
    wrong = [fetch(server, "cmpl-mine", token) for token in (other, "", mine[:-1])]
    unknown = fetch(server, "cmpl-nobody", mine)
    for answer in (*wrong, unknown):
        assert answer.status == 404 and answer.json["error"]["message"] == unknown.json["error"]["message"]
    assert fetch(server, "cmpl-mine", mine, Authorization="Bearer wrong").status == 401
    assert fetch(server, "cmpl-mine", mine).status == 200
    log = server.log.read_text()
    assert mine not in log and other not in log


def test_an_id_that_can_be_fetched_already_is_refused(server: VllmServer) -> None:
    first = complete(server, "twice")
    again = complete(server, "twice")
    assert (first.status, again.status) == (200, 409) and not again.token
    assert "'cmpl-twice'" in again.json["error"]["message"]
    assert fetch(server, "cmpl-twice", first.token).status == 200


def test_an_id_may_look_like_a_file(server: VllmServer) -> None:
    token = complete(server, "x.safetensors").token
    said = fetch(server, "cmpl-x.safetensors", token)
    assert said.status == 200 and said.json["id"] == "cmpl-x.safetensors"
    tensors = load(fetch(server, "cmpl-x.safetensors.safetensors", token).body)
    assert tensors["token_ids"].tolist() == said.json["token_ids"]


ODD_NAMES = [
    "a/b", "a%2Fb", "../../x", "..", "a/./b//c", "end/", "a?b=c", "a#b", "a;b", "a b", "100%", "é", "日本",
    "x" * 5000,
]  # fmt: skip


def test_an_id_may_have_any_characters(server: VllmServer) -> None:
    """A client takes it from the answer's body, and quotes it as any text in an address."""
    for name in ODD_NAMES:
        # A header's bytes are told as Latin-1.
        answer = complete(server, name.encode().decode("latin-1"))
        assert answer.status == 200, answer.body
        public_id = answer.json["id"]
        for quoted in {urllib.parse.quote(public_id), urllib.parse.quote(public_id, safe="")}:
            said = fetch(server, quoted, answer.token)
            assert said.status == 200 and said.json["id"] == public_id, (name, said.body)
            tensors = load(fetch(server, f"{quoted}.safetensors", answer.token).body)
            assert tensors["token_ids"].tolist() == said.json["token_ids"]
    assert fetch(server, "", "x").status == fetch(server, ".safetensors", "x").status == 404


def test_a_token_of_any_characters_and_length_opens_nothing(server: VllmServer) -> None:
    token = complete(server, "tokens").token
    unknown = fetch(server, "cmpl-tokens", "x").json
    for wrong in ("é", "日本".encode().decode("latin-1"), token + "é", f"{token},{token}", "x" * 50_000):
        answer = fetch(server, "cmpl-tokens", wrong)
        assert (answer.status, answer.json) == (404, unknown)
    assert fetch(server, "cmpl-tokens", f" {token} ").status == 200, "blanks around a header mean nothing"


def _raw(server: VllmServer, method: str, path: str, **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    connection.request(method, path, headers={"Authorization": f"Bearer {KEY}", **headers})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def test_nothing_but_get_is_served_and_always_the_whole(server: VllmServer) -> None:
    token = {"X-Tlcore-Token": complete(server, "methods").token}
    path = "/v1/tlcore/requests/cmpl-methods.safetensors"
    for method in ("HEAD", "POST", "PUT", "DELETE"):
        status, headers, _ = _raw(server, method, path, **token)
        assert (status, headers["Allow"]) == (405, "GET"), method
    _, _, whole = _raw(server, "GET", path, **token)
    for wanted in ("bytes=0-9", "bytes=-5", "bytes=99999999-", "lines=1"):
        status, headers, body = _raw(server, "GET", path, Range=wanted, **token)
        assert (status, body) == (200, whole) and headers["Content-Range"] is None
        assert headers["Accept-Ranges"] == "none"


def test_clients_that_leave_while_they_wait_keep_nobody_waiting(server: VllmServer) -> None:
    """Their request's answer is still being computed, or sent."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 64}
    body |= {"temperature": 1.0, "vllm_xargs": {"tlcore": json.dumps(CHOICE)}}
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "waited", "Content-Type": "application/json"}
    place = urllib.parse.urlsplit(server.url).netloc
    completion = http.client.HTTPConnection(place, timeout=60)
    completion.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = completion.getresponse()
    headers = {"Authorization": f"Bearer {KEY}", "X-Tlcore-Token": str(answer.headers["X-Tlcore-Token"])}
    path = "/v1/tlcore/requests/cmpl-waited.safetensors?timeout=60"
    for number in range(64):
        connection = http.client.HTTPConnection(place, timeout=60)
        connection.request("GET", f"{path}&index={number}", headers=headers)
        connection.close()
    assert complete(server, "beside").status == 200
    answer.read()
    completion.close()
    found = fetch(server, "cmpl-waited.safetensors", headers["X-Tlcore-Token"], "?index=63")
    assert found.status == 200 and len(load(found.body)[MLP]) == len(PROMPT) + 99


def test_prompts_and_samples_are_told_apart_by_index(server: VllmServer) -> None:
    prompts = [[5, 6], [7, 8, 9]]
    answer = complete(server, "many", prompt=prompts, n=2, temperature=1)
    token = answer.token
    assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2, 3]
    for index in range(4):
        said = fetch(server, "cmpl-many", token, f"?index={index}").json
        assert said["token_ids"][: said["prompt_length"]] == prompts[index // 2]
        assert (
            len(load(fetch(server, "cmpl-many.safetensors", token, f"?index={index}").body)["token_ids"]) > 3
        )
    for wrong in ("4", "-1", "x", "1_0", "1e0", ""):
        refused = fetch(server, "cmpl-many", token, f"?index={wrong}")
        assert refused.status == 400 and "$.index" in refused.json["error"]["message"]


def _ask(server: VllmServer, kind: str, name: str, choice: Any = CHOICE, **more: Any) -> Answer:
    """The answer of any of the server's routes that generate."""
    if kind == "completions":
        return complete(server, name, choice, **more)
    body: dict[str, Any] = {"model": "tiny", "vllm_xargs": {"tlcore": json.dumps(choice)}, **more}
    messages = [{"role": "user", "content": "the fox"}]
    if kind == "chat/completions":
        body |= {"messages": messages, "max_tokens": 3}
    else:
        body |= {"input": "the fox", "max_output_tokens": 3, "request_id": f"resp-{name}"}
    return send(server, f"/v1/{kind}", body, **{"X-Request-Id": name})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["completions", "chat/completions", "responses"])
def test_every_answer_carries_its_token_in_the_header(server: VllmServer, kind: str, stream: bool) -> None:
    answer = _ask(server, kind, f"carries-{stream}", stream=stream)
    assert answer.status == 200, answer.body
    first = json.loads(answer.body.split(b"data: ")[1].splitlines()[0]) if stream else answer.json
    public_id = first["id"] if "id" in first else first["response"]["id"]
    found = fetch(server, f"{public_id}.safetensors", answer.token)
    assert found.status == 200 and len(load(found.body)[MLP]) >= 1
    assert _ask(server, kind, f"carries-{stream}", stream=stream).status == 409


def test_what_is_answered_before_it_is_computed_is_not_delivered(server: VllmServer) -> None:
    waits = {"background": True, "store": True}
    refused = _ask(server, "responses", "background", **waits)
    assert (refused.status, refused.json["error"]["param"]) == (400, "background")
    assert not refused.token and "not delivered" in refused.json["error"]["message"]
    assert _ask(server, "responses", "background", {"rows": "last"}, **waits).status == 200


def _leave(server: VllmServer, name: str, stream: bool) -> str:
    """Begin a long completion and close the connection; returns the token that came, if any."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": stream}
    # So many samples that the whole answer takes a second, and its client has left before.
    body |= {} if stream else {"n": 128, "temperature": 1.0}
    body["vllm_xargs"] = {"tlcore": json.dumps(CHOICE)}
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": name, "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    token = ""
    if stream:
        answer = connection.getresponse()
        answer.readline()
        token = answer.headers["X-Tlcore-Token"]
        answer.close()
    else:
        # One that has not begun by then finds its client gone.
        time.sleep(0.1)
    connection.close()
    return token


def test_of_a_stream_that_its_client_left_what_there_was_is_fetched(server: VllmServer) -> None:
    token = _leave(server, "left", stream=True)
    found = fetch(server, "cmpl-left.safetensors", token)
    assert found.status == 200, found.body
    tensors = load(found.body)
    assert 4 <= len(tensors[MLP]) <= 103 and tensors["token_ids"].tolist()[:4] == PROMPT


def test_an_id_whose_client_left_before_the_answer_is_free_again(server: VllmServer) -> None:
    _leave(server, "gone", stream=False)
    answers: list[Answer] = []

    def answered() -> bool:
        answers.append(complete(server, "gone"))
        return answers[-1].status == 200

    wait_until(answered, "the id is free", 60)
    assert {each.status for each in answers} <= {200, 409}
    assert fetch(server, "cmpl-gone", answers[-1].token).status == 200


def test_of_a_request_without_rows_there_is_nothing(server: VllmServer) -> None:
    for name, choice in (
        ("far", {**CHOICE, "rows": {"from": 100}}),
        ("no-answer", {**CHOICE, "rows": "response"}),
    ):
        answer = complete(server, name, choice, max_tokens=1)
        assert answer.status == 200 and answer.token
        for query in ("", ".safetensors"):
            found = fetch(server, f"cmpl-{name}{query}", answer.token)
            assert found.status == 404, found.body
            assert "nothing was captured" in found.json["error"]["message"]


def test_a_request_over_the_limits_has_no_token_and_leaves_its_id(server: VllmServer) -> None:
    for more in ({"prompt": [5] * 200}, {"max_tokens": 500}, {"n": 10**9}, {"logprobs": 10**6}):
        refused = complete(server, "over", **more)
        assert refused.status == 400 and not refused.token, refused.body
    assert complete(server, "over").status == 200


def test_many_at_once_get_their_own_before_a_commit_is_due(server: VllmServer) -> None:
    def one(number: int) -> float:
        answer = complete(server, f"load{number}", prompt=[9, 10 + number], max_tokens=8)
        found = fetch(server, f"cmpl-load{number}.safetensors", answer.token)
        assert load(found.body)["token_ids"].tolist()[:2] == [9, 10 + number]
        return found.first_byte_s

    alone = sorted(one(100 + number) for number in range(9))
    with ThreadPoolExecutor(16) as pool:
        together = sorted(pool.map(one, range(16)))
    shown = f"{alone[4]:.3f} s ({alone[0]:.3f} to {alone[-1]:.3f}), one of 16 {together[8]:.3f} s"
    # No commit was due by then, so that each was stored because it was asked for.
    sys.stdout.write(f"first byte after the answer: {shown}\n")


def test_zstd_and_nothing_else_is_compressed(server: VllmServer) -> None:
    zstandard = pytest.importorskip("zstandard")
    token = complete(server, "packed").token
    plain = fetch(server, "cmpl-packed.safetensors", token, **{"Accept-Encoding": "gzip"})
    packed = fetch(server, "cmpl-packed.safetensors", token, **{"Accept-Encoding": "zstd"})
    assert plain.headers["Content-Encoding"] is None and packed.headers["Content-Encoding"] == "zstd"
    assert zstandard.ZstdDecompressor().decompress(packed.body) == plain.body
    assert load(plain.body)[MLP].shape[0] == 6


def test_what_is_not_allowed_or_forged_is_refused_and_others_have_no_token(server: VllmServer) -> None:
    forged = {"tlcore_delivery": "x"}
    for extra, key in (({"tlcore": '{"deliver": 1}'}, "tlcore.deliver"), (forged, "tlcore_delivery")):
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "vllm_xargs": extra}
        answer = send(server, "/v1/completions", body)
        assert answer.status == 400 and answer.json["error"]["param"] == key
    for choice in ({}, {"rows": "last"}, {"enabled": False, "deliver": True}):
        answer = complete(server, "none", choice)
        assert answer.status == 200, answer.body
        token = answer.token
        if token:
            assert fetch(server, "cmpl-none", token).status == 404
    assert complete(server, "bad", {"deliver": True, "rows": "?"}).status == 400
    assert complete(server, "bad", {"deliver": True}, max_tokens=-1).status == 400
    assert complete(server, "bad", {"deliver": True}).status == 200


def test_a_request_is_fetched_after_its_run_was_stopped_and_in_the_next_one(server: VllmServer) -> None:
    before = complete(server, "before")
    first = fetch(server, "cmpl-before.safetensors", before.token)
    assert send(server, "/v1/tlcore/stop", {}).json["state"] == "closed"
    assert fetch(server, "cmpl-before.safetensors", before.token).body == first.body
    assert complete(server, "between").status == 400, "nothing is captured, so nothing can be delivered"
    kept = ("sample_rate", "log_step_ids", "module_call_match", "request_overrides", "delivery")
    config = delivering(Path(), MODULES)["intermediate-log-config"]
    started = send(server, "/v1/tlcore/start", {**{key: config[key] for key in kept}, "backend": BACKEND})
    assert started.status == 200, started.body
    after = complete(server, "after")
    runs = {fetch(server, f"cmpl-{name}", token).json["run"] for name, token in (
        ("before", before.token), ("after", after.token),
    )}  # fmt: skip
    assert len(runs) == 2 and started.json["url"] in runs
    assert fetch(server, "cmpl-before.safetensors", before.token).body == first.body
    assert len(load(fetch(server, "cmpl-after.safetensors", after.token).body)[MLP]) == 6
