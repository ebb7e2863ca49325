"""Credentials of every kind: in no file, log, error, traceback or printed object."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

import tlcore
from tests.reading import command
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.errors import TlcoreError

SECRETS = {
    "option": "canary-in-an-option",
    "nested": "canary/in+a nested=option",
    "user": "canary-in-userinfo",
    "environment": "canary-in-the-environment",
}
OPTIONS = {"secret": SECRETS["option"], "config_kwargs": {"headers": [{"token": SECRETS["nested"]}]}}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def everything_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Secrets in the environment, and every word of ours in the log."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "GOOGLE_API_KEY"):
        monkeypatch.setenv(name, SECRETS["environment"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPUBLIC")
    with caplog.at_level(logging.DEBUG, logger="tlcore"):
        yield
    unseen(caplog.text)


def unseen(*texts: str) -> None:
    for text in texts:
        for place, secret in SECRETS.items():
            for form in (secret, secret.replace("/", "%2F").replace("+", "%2B").replace(" ", "%20")):
                assert form not in text, f"the secret {place!r} shows in {text[:500]!r}"


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2))


def every_word(error: BaseException) -> str:
    """What a user could see of an exception: itself, its causes, and what another process gets of it."""
    parts = [str(error), repr(error), "".join(traceback.format_exception(error)), str(vars(error))]
    if isinstance(error, TlcoreError):
        parts.append(str(pickle.loads(pickle.dumps(error))))
    return "\n".join(parts)


def memory(**more: Any) -> dict[str, Any]:
    url = f"memory://user:{SECRETS['user']}@secrets/runs"
    return {"backend": {"name": "fsspec", "url": url, "storage_options": OPTIONS, **more}}


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_run_and_its_objects_show_none(form: str, tmp_path: Path) -> None:
    module = model()
    with tlcore.capture(module, module_call_match=".", **memory(format=form)) as captured:
        module(torch.ones(1, 2))
        session = captured.session
        unseen(*map(repr, (captured, captured.config, session, session.run, session._sink)))
        unseen(str(captured.config), f"{captured.config!r}")
    assert captured.ledger.stored == 2
    place = fsspec.filesystem("memory")
    files = [name for name in place.find("/") if captured.session.run_id in name]
    assert files
    for name in files:
        unseen(place.cat_file(name).decode("latin-1"))
    unseen(json.dumps(captured.session.run.document), captured.config.to_json(redact=True).__repr__())


def test_the_run_document_keeps_what_is_no_secret() -> None:
    config = load_config(**memory(format="safetensors"))
    document = new_run(config).document
    unseen(json.dumps(document))
    assert document["config"]["backend"]["format"] == "safetensors"
    assert "***" in json.dumps(document["config"])


FAILING: dict[str, Callable[[], Any]] = {
    "a server that is not there": lambda: tlcore.capture(
        model(),
        module_call_match=".",
        backend={
            "name": "fsspec",
            "url": f"s3://user:{SECRETS['user']}@bucket/runs",
            "storage_options": {"key": "AKIAPUBLIC", "endpoint_url": NOWHERE, **OPTIONS},
        },
    ).__enter__(),
    "options that the filesystem refuses": lambda: tlcore.capture(
        model(),
        module_call_match=".",
        backend={"name": "fsspec", "url": "s3://bucket/x", "storage_options": {"anon": object}},
    ),
    "an option of the wrong type": lambda: load_config(
        backend={"name": "fsspec", "url": "s3://b/x", "storage_options": SECRETS["option"]}
    ),
    "an option that is none": lambda: load_config(
        backend={"name": "fsspec", "url": "s3://b/x", "storage_optoins": {"secret": SECRETS["option"]}}
    ),
    "an unknown protocol": lambda: tlcore.open_run(f"nowhere://user:{SECRETS['user']}@host/x", OPTIONS),
    "no run there": lambda: tlcore.open_run(f"memory://user:{SECRETS['user']}@nothing/x", OPTIONS),
    "a signed URL": lambda: tlcore.open_run(f"nowhere://host/x?token={SECRETS['option']}"),
    "a user without a password": lambda: tlcore.open_run(f"nowhere://{SECRETS['user']}@host/x"),
}


@pytest.mark.parametrize("failing", FAILING)
def test_an_error_shows_none(failing: str) -> None:
    with pytest.raises(TlcoreError) as caught:
        FAILING[failing]()
    unseen(every_word(caught.value))


@pytest.mark.parametrize("fault", ["write", "commit"])
def test_what_a_failing_place_says_is_cleaned(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server may quote the request, credentials and all."""
    from fsspec.implementations.memory import MemoryFileSystem

    pipe_file = MemoryFileSystem.pipe_file

    def quoting(self: Any, path: str, value: bytes, **keys: Any) -> Any:
        if path.endswith("step.json") if fault == "commit" else "shard" in path or path.endswith(".pt"):
            raise PermissionError(f"denied: {OPTIONS} for {SECRETS['user']}")
        return pipe_file(self, path, value, **keys)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", quoting)
    module = model()
    with (
        pytest.raises(tlcore.CaptureError) as caught,
        tlcore.capture(module, module_call_match=".", on_error="raise", **memory()) as captured,
    ):
        module(torch.ones(1, 2))
    assert captured.ledger.failed == 2
    unseen(every_word(caught.value), json.dumps(captured.ledger.to_json()))
    assert "could not be stored" in caplog.text


@pytest.mark.parametrize("name", ["ls", "show", "verify", "convert", "push", "prune", "compare"])
def test_no_command_shows_one(name: str, tmp_path: Path) -> None:
    url = f"s3://user:{SECRETS['user']}@bucket/runs"
    words = {
        "show": [url, "step_0/a"],
        "convert": [url, str(tmp_path), "--backend", json.dumps({"name": "pt", "secret": SECRETS["option"]})],
        "compare": [f"memory://u:{SECRETS['user']}@b/x", f"memory://u:{SECRETS['user']}@b/y"],
    }.get(name, [url])
    options = ["--storage-options", json.dumps({"endpoint_url": NOWHERE, **OPTIONS})]
    status, text = command(name, *words, *([] if name in ("compare", "push") else options))
    assert status != 0
    unseen(text)
