"""An OpenAI-compatible vLLM server for tests, on loopback, ended by the process id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.adapters.vllm.helpers import ENVIRONMENT, REPOSITORY
from tests.servers import free_ports
from tests.waiting import Watched, wait_until, watched

# The worker in the engine's process, for servers whose processes are not what is tested: one less to start.
FEWER_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Of a machine that is busy with much else; one that has died is noticed at once.
START_SECONDS = 600


@dataclass(frozen=True)
class VllmServer:
    """A running server: its address, its process, and the file with its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    watched: Watched

    def ask(
        self, path: str, body: Any = None, key: str | None = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """The status and the JSON answer of a request; a POST where there is a ``body``."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        # A new connection each time, for whichever API server takes it.
        sent["Connection"] = "close"
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, sent), timeout=300
            ) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def ready(self) -> bool:
        """Whether it answers by now."""
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
            return True
        return False

    def end(self, how: signal.Signals = signal.SIGTERM, within_s: float = 90) -> None:
        """Ask it to end, and return once it has."""
        self.watched.may_end = True
        self.process.send_signal(how)
        self.process.wait(within_s)

    def text(self, path: str) -> str:
        """The text at a path."""
        with urllib.request.urlopen(self.url + path, timeout=300) as answer:
            return str(answer.read().decode())


@contextmanager
def serving(
    directory: Path, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[VllmServer]:
    """A server with these settings (names of flags without dashes), ready to answer."""
    (port,) = free_ports(1)
    # JSON is YAML.
    config = directory / "server.yaml"
    config.write_text(json.dumps({"host": "127.0.0.1", "port": port, **settings}))
    log = directory / "server.log"
    several = "api-server-count" in settings
    program = (
        ("tests.adapters.vllm.serve_command", "serve") if several else ("vllm.entrypoints.openai.api_server",)
    )
    command = (sys.executable, "-m", *program, "--config", str(config))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**ENVIRONMENT, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with watched("the vLLM server", process, log) as entry:
                server = VllmServer(f"http://127.0.0.1:{port}", process, log, entry)
                wait_until(server.ready, "the server answers", START_SECONDS)
                yield server
        finally:
            # Its engine and workers are its own session's; they must not outlive it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
