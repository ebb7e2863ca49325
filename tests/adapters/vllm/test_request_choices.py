"""Requests that choose their own capture, in an engine of this process and over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report
from tests.adapters.vllm.server import FEWER_PROCESSES, VllmServer, serving
from tests.models import tiny_llama
from tlcore.errors import MissingError

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "choices_script.py")
MLP = "model.layers.2.mlp/outputs_cpu"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report(SCRIPT, str(tmp_path_factory.mktemp("choices")))


def test_each_request_has_what_it_chose(said: dict[str, Any]) -> None:
    everything, chosen = (tlcore.open_run(said[name]["url"]) for name in ("all", "chosen"))
    wholes = [everything.request(each) for each in said["all"]["ids"]]
    narrow, _, out, last = said["chosen"]["ids"]
    for request in (said["chosen"]["ids"][1], out):
        with pytest.raises(MissingError):
            chosen.request(request)
    one = chosen.request(narrow)
    assert {name.split("/")[0] for name in one.names} == {"model.layers.2.mlp"}
    assert one.positions(MLP) == [4, 5] and torch.equal(one[MLP], wholes[0][MLP][4:])
    assert said["chosen"]["live"] == {name: one.positions(name) for name in one}
    other = chosen.request(last)
    assert set(other.names) == set(wholes[3].names)
    assert other.positions(MLP) == [3, 4, 5] and torch.equal(other[MLP], wholes[3][MLP][3:])
    assert other.token_ids.tolist() == wholes[3].token_ids.tolist()
    assert chosen.state == "complete" and chosen.ledger.balanced


def test_wrong_ones_are_value_errors_that_name_the_key(said: dict[str, Any]) -> None:
    words = [
        "$.tlcore.rowz",
        "$.tlcore.rows",
        '"model.layers.2.mlp"',
        "$.tlcore: not valid",
        "$.tlcore: it",
    ]
    for told, expected in zip(said["wrong"], words, strict=True):
        assert expected in told
    for name in ("without a run", "not allowed"):
        assert "$.tlcore.rows: no request may choose it here: request_overrides is []." in said[name]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmServer, Path]]:
    """A server that captures two modules of all steps, and lets requests choose of these."""
    directory = tmp_path_factory.mktemp("served")
    settings = {
        "model": str(tiny_llama()),
        "enforce-eager": True,
        "max-model-len": 128,
        "chat-template": "{{ messages[0]['content'] }}",
        "intermediate-log-config": {
            "output_dir": str(directory / "dumps"),
            "log_step_ids": [],
            "module_call_match": [r"layers\.2\.mlp$", "embed_tokens"],
            "request_overrides": ["modules", "rows"],
            "backend": "safetensors",
        },
    }
    with serving(directory, settings, FEWER_PROCESSES) as server:
        yield server, directory / "dumps"


def _completion(server: VllmServer, name: str, choice: Any = None, **more: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": str(tiny_llama()), "prompt": [5, 6, 7, 8], "max_tokens": 3, "ignore_eos": True, **more}
    if choice is not None:
        body["vllm_xargs"] = {"tlcore": json.dumps(choice)}
    return server.ask("/v1/completions", body, X_Request_Id=name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ({"row": "last"}, "tlcore.row"),
        ({"enabled": True}, "tlcore.enabled"),
        ({"modules": ["model.layers.1.mlp"]}, "tlcore.modules[0]"),
    ],
)
def test_a_wrong_choice_is_answered_with_400_and_its_key(
    served: tuple[VllmServer, Path], choice: Any, path: str, stream: bool
) -> None:
    status, answer = _completion(served[0], "wrong", choice, stream=stream)
    assert status == 400
    assert answer["error"]["param"] == path and f"$.{path}: " in answer["error"]["message"]


def test_no_beam_search_chooses(served: tuple[VllmServer, Path]) -> None:
    beams = {"use_beam_search": True, "n": 2, "temperature": 0}
    status, answer = _completion(served[0], "out", {"enabled": False}, **beams)
    assert status == 400 and answer["error"]["param"] == "use_beam_search"
    assert "$.use_beam_search: vLLM's beam search does not hand" in answer["error"]["message"]


def test_wrong_ones_do_not_disturb_others_and_the_rest_is_stored(served: tuple[VllmServer, Path]) -> None:
    server, dumps = served
    long: list[Any] = []
    thread = threading.Thread(target=lambda: long.append(_completion(server, "long", None, max_tokens=60)))
    thread.start()
    for number in range(5):
        assert _completion(server, f"bad{number}", {"rows": "?"})[0] == 400
        assert _completion(server, f"out{number}", {"enabled": False})[0] == 200
    narrow = {"modules": ["model.embed*"], "rows": "prompt"}
    assert _completion(server, "two", narrow, n=2, temperature=1)[0] == 200
    chat = {"model": str(tiny_llama()), "messages": [{"role": "user", "content": "a"}]}
    refused = server.ask("/v1/chat/completions", {**chat, "vllm_xargs": {"tlcore": '{"rows": 1}'}})
    assert refused[0] == 400 and refused[1]["error"]["param"] == "tlcore.rows"
    thread.join(60)
    ((status, answer),) = long
    assert status == 200 and answer["usage"]["completion_tokens"] == 60
    (directory,) = dumps.iterdir()
    server.end()
    run = tlcore.open_run(directory)
    assert run.state == "complete" and run.ledger.balanced
    whole = run.request("long")
    assert whole.positions(MLP) == list(range(63)) and not whole.gaps(MLP)
    for sample in (0, 1):
        two = run.request("two", sample=sample)
        assert {name.split("/")[0] for name in two.names} == {"model.embed_tokens"}
        assert set(two.positions("model.embed_tokens/outputs_cpu")) <= set(range(4))
    stored = {row["external_request_id"] for number in run.steps for row in run.step(number).rows or ()}
    assert not [each for each in stored if each and ("out" in each or "bad" in each)]
