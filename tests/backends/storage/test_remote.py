"""`FsspecStore` where servers are slow, busy, silent or absent, and what its errors say."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tlcore.errors import BackendError
from tlcore.storage import Location, RetryPolicy
from tlcore.testing import RunWriter, make_run
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.storage.obstore_options import obstore_options
from tlcore_backends.storage.remote import FsspecStore
from tlcore_backends.storage.retries import RemoteCalls, is_transient

KEY, SECRET = "AKIAEXAMPLEKEYID", "example/secret+key"


class Busy(http.server.BaseHTTPRequestHandler):
    """Answers 503 as often as its server says, then 200."""

    server: BusyServer

    def do_PUT(self) -> None:
        self.server.requests += 1
        busy = self.server.requests <= self.server.busy_answers
        body = f"<Error><Code>ServiceUnavailable</Code><Message>{SECRET}</Message></Error>".encode()
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", str(len(body) if busy else 0))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body if busy else b"")

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


class BusyServer(http.server.ThreadingHTTPServer):
    requests = 0
    busy_answers = 0


@pytest.fixture
def busy() -> Iterator[BusyServer]:
    server = BusyServer(("127.0.0.1", 0), Busy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(30)
    server.server_close()


def s3(port: int, **limits: Any) -> FsspecStore:
    options = {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    return FsspecStore("s3://bucket/run", options, RetryPolicy(**limits))


def test_a_busy_server_is_asked_again(busy: BusyServer) -> None:
    busy.busy_answers = 2
    assert s3(busy.server_port).put("a", [b"x"]) == 1
    assert busy.requests == 3


def test_a_server_that_stays_busy_is_asked_as_often_as_our_policy_says(busy: BusyServer) -> None:
    busy.busy_answers = 1000
    with pytest.raises(BackendError) as caught:
        s3(busy.server_port, attempts=2).put("a", [b"x"])
    assert busy.requests == 2
    text = str(caught.value)
    assert "cannot write s3://bucket/run/a" in text
    assert SECRET not in text
    assert "***" in text


def test_a_silent_server_does_not_hang_anything() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = s3(silent.getsockname()[1], deadline_s=0.5, attempts=2)
        begin = time.monotonic()
        with pytest.raises(BackendError, match=r"cannot write .*: no answer within 0.5 s"):
            store.put("a", [b"x" * 1000])
        assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_a_sink_that_cannot_write_fails_when_it_is_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    options = {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    with pytest.raises(BackendError, match=r"run\.json: EndpointConnectionError") as caught:
        RunWriter(PtSink(), run=make_run("s3://bucket/run"), location=Location("s3://bucket", options))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("bogus://bucket/run", {}, "unknown protocol 'bogus'"),
        ("s3://", {}, "names no bucket or directory"),
        ("s3://user:pass-word@bucket/run?token=abcdef", {}, ""),
        ("ftp://host/run", {"port": "no number"}, "ftp://host/run: cannot be opened"),
    ],
)
def test_a_place_that_cannot_be_opened_is_named(url: str, options: dict[str, Any], message: str) -> None:
    if not message:
        assert FsspecStore(url, options).url == "s3://***@bucket/run?***"
        return
    with pytest.raises(BackendError, match=message):
        FsspecStore(url, options)


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/r", "s3fs", "s3"), ("gs://b/r", "gcsfs", "gcs"), ("az://b/r", "adlfs", "azure")],
)
@pytest.mark.slow
def test_a_missing_package_names_the_extra(url: str, package: str, extra: str) -> None:
    program = f"""
import sys
sys.modules[{package!r}] = None
from tlcore_backends.storage.remote import FsspecStore
FsspecStore({url!r})
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert f"BackendError: {url}: a package for" in ended.stderr
    assert f"pip install 'tlcore[{extra}]'" in ended.stderr


def test_secrets_are_cut_from_any_answer() -> None:
    from tlcore_backends.storage.redaction import Redactor

    connection = (
        "DefaultEndpointsProtocol=http;AccountName=devstore;AccountKey=c2VjcmV0a2V5;BlobEndpoint=http://h"
    )
    options = {
        "connection_string": connection,
        "client_kwargs": {"password": "pass word", "region_name": "eu"},
    }
    redactor = Redactor("s3://u:hunter2@bucket/p", options)
    text = redactor.clean(
        "no c2VjcmV0a2V5, pass%20word, pass word, hunter2, http://x:y@h/p?sig=abc; eu devstore\nmore"
    )
    assert text == "no ***, ***, ***, ***, http://***@h/p?*** eu devstore"
    assert redactor.clean("AccountKey=other; x") == "AccountKey=***; x"
    assert len(redactor.clean("x" * 1000)) == 300


def test_what_may_pass_and_what_never_does() -> None:
    class AnswerError(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    assert [is_transient(AnswerError(status)) for status in (400, 403, 404, 429, 500, 503)] == [
        *(False, False, False),
        *(True, True, True),
    ]
    assert is_transient(ConnectionResetError())
    assert not is_transient(PermissionError())
    caused = OSError("translated")
    caused.__cause__ = AnswerError(403)
    assert not is_transient(caused)


def test_a_call_in_a_thread_has_the_same_deadline() -> None:
    class Stuck:
        async_impl = False
        loop = None

        def invalidate_cache(self, path: str | None = None) -> None:
            """Nothing is cached."""

        def find(self, seconds: float) -> str:
            time.sleep(seconds)
            return "found"

    calls = RemoteCalls(Stuck(), RetryPolicy(0.1, 2))
    assert calls.run("find", 0.0) == "found"
    with pytest.raises(TimeoutError, match="no answer"):
        calls.run("find", 1.0)


@pytest.mark.usefixtures("no_aws_variables")
@pytest.mark.parametrize(
    ("changed", "usable"),
    [
        ({}, True),
        ({"token": "session"}, True),
        ({"key": None}, False),
        ({"client_kwargs": {}}, False),
        ({"client_kwargs": {"region_name": "eu-west-1", "verify": False}}, False),
        ({"anon": True}, False),
        ({"config_kwargs": {"s3": {"addressing_style": "path"}}}, False),
    ],
)
def test_obstore_is_used_only_where_the_options_mean_the_same(
    changed: dict[str, Any], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"key": KEY, "secret": SECRET, "endpoint_url": "http://127.0.0.1:9"}
    options |= {"client_kwargs": {"region_name": "eu-west-1"}, **changed}
    assert (obstore_options(options) is not None) == usable
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another")
    assert obstore_options(options) is None


@pytest.mark.usefixtures("no_aws_variables")
@pytest.mark.parametrize(
    ("variable", "endpoint", "usable"),
    [
        ("AWS_DEFAULT_REGION", "https://127.0.0.1:9", True),
        ("AWS_PROFILE", "http://127.0.0.1:9", False),
        ("AWS_CA_BUNDLE", "http://127.0.0.1:9", True),
        ("AWS_CA_BUNDLE", "https://127.0.0.1:9", False),
        ("AWS_CA_BUNDLE", None, False),
    ],
)
def test_obstore_is_used_only_where_the_environment_means_nothing_else(
    variable: str, endpoint: str | None, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"key": KEY, "secret": SECRET, "client_kwargs": {"region_name": "eu-west-1"}}
    if endpoint is not None:
        options["endpoint_url"] = endpoint
    monkeypatch.setenv(variable, "other")
    assert (obstore_options(options) is not None) == usable
