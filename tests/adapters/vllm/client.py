"""A client of a server's completions that fetches what was captured of its requests."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from tests.adapters.vllm.server import VllmServer
from tests.models import tiny_llama

KEY = "not-a-secret"
MODULES = r"layers\.[02]\.mlp$"
MLP = "model.layers.2.mlp/outputs"
CHOICE = {"deliver": True, "modules": ["model.layers.2.mlp"]}
# A step by itself is stored after ten minutes: what is fetched in time, the fetching has had stored.
BACKEND = {"name": "safetensors", "commit_s": 600}
PROMPT = [5, 6, 7, 8]


def delivering(dumps: Path, modules: str, **more: Any) -> dict[str, Any]:
    """The settings of a server that captures these modules of the requests alone that ask for it.

    ``more`` are keys of the configuration.
    """
    captured = {
        "output_dir": str(dumps),
        "sample_rate": 0,
        "log_step_ids": [],
        "module_call_match": [modules],
        "request_overrides": ["modules", "rows"],
        "delivery": True,
        "backend": BACKEND,
    }
    return {
        "model": str(tiny_llama()),
        "served-model-name": "tiny",
        "enforce-eager": True,
        "max-model-len": 128,
        "api-key": KEY,
        "no-enable-prefix-caching": True,
        "intermediate-log-config": captured | more,
    }


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

    @property
    def token(self) -> str:
        """What opens the request, empty where nothing does."""
        return self.headers["X-Tlcore-Token"] or ""


def send(server: VllmServer, path: str, body: Any = None, **headers: str) -> Answer:
    """One HTTP request over a connection of its own, for whichever API server takes it."""
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    sent["Connection"] = "close"
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


def complete(server: VllmServer, name: str, choice: Any = CHOICE, **more: Any) -> Answer:
    """A completion of three tokens whose id has this name."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "temperature": 0, **more}
    body["vllm_xargs"] = {"tlcore": json.dumps(choice)}
    return send(server, "/v1/completions", body, **{"X-Request-Id": name})


def fetch(server: VllmServer, name: str, token: str, query: str = "", **headers: str) -> Answer:
    """What was captured of the request with this id."""
    return send(server, f"/v1/tlcore/requests/{name}{query}", **{"X-Tlcore-Token": token, **headers})
