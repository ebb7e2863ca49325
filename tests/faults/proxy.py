"""An HTTP proxy before an object store, which can be told to fail in the ways that networks do."""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Fault = Callable[["Handler", str], bool]
_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})
_WRITES = ("PUT", "POST")


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to ``upstream_port`` unless its `fault` takes them.

    A fault is called with the handler and the method, before the body is read; True means that it has
    dealt with the request. `down` is an outage: connections are closed as soon as they are made.
    """

    daemon_threads = True
    block_on_close = False
    # A client opens many connections at once.
    request_queue_size = 128

    def __init__(self, upstream_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream_port = upstream_port
        self.fault: Fault | None = None
        self.down = False
        # Set to let silent requests go at the end of a test.
        self.released = threading.Event()
        self.writes = 0
        self.faults = 0
        self.lock = threading.Lock()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection is served at all."""
        return not self.down

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client, and one to the upstream server."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def handle_expect_100(self) -> bool:
        """A silent server does not even ask for the body."""
        if self.server.fault is silent:
            return not silent(self, self.command)
        return super().handle_expect_100()

    def serve(self) -> None:
        if self.command in _WRITES:
            with self.server.lock:
                self.server.writes += 1
        if self.server.down:
            self.hang_up()
            return
        fault = self.server.fault
        if fault is not None and fault(self, self.command):
            return
        self.pass_on(self.read_body())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def count_fault(self) -> None:
        with self.server.lock:
            self.server.faults += 1

    def read_body(self, bytes_per_s: float | None = None) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            return self._read_chunked() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        if bytes_per_s is None:
            return self.rfile.read(int(length))
        parts: list[bytes] = []
        left = int(length)
        while left > 0:
            piece = self.rfile.read(min(left, max(1, int(bytes_per_s / 10))))
            if not piece or self.server.released.is_set():
                break
            parts.append(piece)
            left -= len(piece)
            time.sleep(0.1)
        return b"".join(parts)

    def _read_chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def pass_on(self, body: bytes) -> None:
        """Ask the upstream server and hand its answer back."""
        headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
        if body:
            headers["Content-Length"] = str(len(body))
        self.upstream.request(self.command, self.path, body or None, headers)
        answer = self.upstream.getresponse()
        content = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for key, value in answer.getheaders():
            if key.lower() not in _HOP and key.lower() != "content-length":
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        """Answer with one of S3's errors."""
        self.read_body()
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} on purpose</Message></Error>"
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def hang_up(self) -> None:
        """Cut the connection in both directions, at once."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


def busy(handler: Handler, method: str) -> bool:
    """503 SlowDown to everything that writes."""
    if method in _WRITES:
        handler.count_fault()
        handler.refuse(503, "SlowDown")
        return True
    return False


def expired(handler: Handler, method: str) -> bool:
    """What S3 says once temporary credentials are too old."""
    handler.count_fault()
    handler.refuse(400, "ExpiredToken")
    return True


def silent(handler: Handler, method: str) -> bool:
    """Accept the request and never answer."""
    handler.count_fault()
    handler.server.released.wait(120)
    handler.hang_up()
    return True


def cut(handler: Handler, method: str) -> bool:
    """Take half of a body, pass that half on, and cut both connections."""
    length = int(handler.headers.get("Content-Length") or 0)
    if method not in _WRITES or not length:
        return False
    handler.count_fault()
    half = handler.rfile.read(length // 2)
    upstream = handler.upstream
    upstream.putrequest(method, handler.path, skip_host=True, skip_accept_encoding=True)
    for key, value in handler.headers.items():
        if key.lower() not in _HOP:
            upstream.putheader(key, value)
    upstream.endheaders(half)
    upstream.close()
    handler.hang_up()
    return True


def cut_later_parts(handler: Handler, method: str) -> bool:
    """Let a multipart upload begin, and cut every part after its first."""
    query = handler.path.partition("?")[2]
    return "partNumber=" in query and "partNumber=1&" not in f"{query}&" and cut(handler, method)


def drip(handler: Handler, method: str) -> bool:
    """Take bodies at 500 bytes a second."""
    if method not in _WRITES:
        return False
    handler.count_fault()
    body = handler.read_body(500)
    if handler.server.released.is_set():
        handler.hang_up()
    else:
        handler.pass_on(body)
    return True


def times(count: int, fault: Fault) -> Fault:
    """A fault that happens ``count`` times."""
    left = [count]
    lock = threading.Lock()

    def limited(handler: Handler, method: str) -> bool:
        with lock:
            if method not in _WRITES or left[0] <= 0:
                return False
            left[0] -= 1
        return fault(handler, method)

    return limited


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """A running proxy before the server at ``port``."""
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.released.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join(30)
