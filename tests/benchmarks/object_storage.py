"""Capture straight to SeaweedFS against plain clients that put the same blobs."""

from __future__ import annotations

import importlib
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import torch

from tests.faults.proxy import Proxy
from tests.servers import BUCKET, Server, seaweedfs
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

from .capturing import distinct, raw
from .rows import Limit, Row, Scale, at_least
from .timing import Times, interleaved, ratio, timed
from .workload import Workload, workload

_DELAY_S = 0.01
REGION = {"client_kwargs": {"region_name": "us-east-1"}}


def table(scale: Scale) -> list[Row]:
    """MB/s from the last hook to the commit, and of the clients; then the same over a slower network."""
    work = workload("prefill", scale)
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name, seaweedfs(Path(name)) as server:
        near = _measure(work, server, scale)
        with delayed(server, _DELAY_S) as (far_server, _):
            far = _measure(work, far_server, scale)
    what = "SeaweedFS, safetensors, MB/s"
    sequence = "one PUT per tensor in sequence"
    return [
        near.row(f"{what} / fastest plain client's", "fastest", at_least(0.9)),
        near.row(f"{what} / {sequence}", sequence, at_least(3)),
        far.row(f"{what} / {sequence}, each answer {_DELAY_S * 1e3:.0f} ms later", sequence, None),
    ]


@dataclass(frozen=True)
class _Measured:
    times: Times
    size: int
    blobs: int
    tensors: int

    def row(self, what: str, base: str, target: Limit | None) -> Row:
        speeds = {name: self.size / median(seconds) / 1e6 for name, seconds in self.times.items()}
        figures = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items() if name != "fastest")
        detail = f"MB/s: {figures}; {self.size / 1e6:.0f} MB in {self.blobs} blobs, {self.tensors} tensors"
        return Row(what, ratio(self.times, base, "tlcore"), target, "times", detail)


@contextmanager
def delayed(server: Server, delay_s: float) -> Iterator[tuple[Server, list[str]]]:
    """The server behind a proxy that holds each request back for a moment; and all requests' methods."""
    proxy = Proxy(server.port)
    requests: list[str] = []

    def wait(handler: object, method: str) -> bool:
        requests.append(method)
        time.sleep(delay_s)
        return False

    proxy.fault = wait
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{proxy.server_port}"
    try:
        there = {**server.options, "endpoint_url": place}
        yield replace(server, port=proxy.server_port, options=there), requests
    finally:
        proxy.shutdown()
        proxy.server_close()


def _measure(work: Workload, server: Server, scale: Scale) -> _Measured:
    session = _session(work, server)
    payload = distinct(work.tensors())
    step = _Steps(session, work)
    step.commit_s()
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **server.options)
    blobs = {name: filesystem.cat_file(name) for name in filesystem.find(step.place)}
    store = obstore_of(server)
    times = interleaved(
        {
            "tlcore": step.commit_s,
            "obstore": lambda: put_all_s(store, blobs),
            "s3fs": lambda: pipe_all_s(filesystem, blobs),
            "one PUT per tensor in sequence": lambda: _put_each_s(store, payload),
        },
        scale.repeats,
    )
    session.close()
    times["fastest"] = [min(pair) for pair in zip(times["obstore"], times["s3fs"], strict=True)]
    return _Measured(times, sum(map(len, blobs.values())), len(blobs), len(payload))


def _session(work: Workload, server: Server) -> Session:
    backend = {
        "name": "fsspec",
        "format": "safetensors",
        "url": f"{server.url}/runs",
        "storage_options": {**server.options, **REGION},
    }
    config = load_config(backend=backend, log_step_ids=list(range(0, 1000, 2)))
    session = Session(config, new_run(config))
    session.attach(work.model)
    return session


class _Steps:
    """Captured forwards, each waited for; ``place`` is where the first one lies."""

    def __init__(self, session: Session, work: Workload) -> None:
        self._session = session
        self._work = work
        self._next = 0
        self.place = f"{session.url.partition('://')[2]}/step_0"

    def commit_s(self) -> float:
        """Seconds from the last hook of a forward until its step is committed."""
        self._session.begin_step(self._next)
        self._next += 2
        self._work.forward()
        begin = time.perf_counter()
        self._session.end_step()
        self._session.flush()
        return time.perf_counter() - begin


def obstore_of(server: Server) -> Any:
    stores: Any = importlib.import_module("obstore.store")
    return stores.S3Store(
        BUCKET,
        access_key_id=server.options["key"],
        secret_access_key=server.options["secret"],
        region="us-east-1",
        endpoint=server.options["endpoint_url"],
        client_options={"allow_http": True, "timeout": "1h"},
    )


def put_all_s(store: Any, blobs: Mapping[str, bytes]) -> float:
    """Seconds in which obstore puts every blob, with the settings that it comes with."""

    def put() -> None:
        for index, data in enumerate(blobs.values()):
            store.put(f"plain/{index}", data)

    return timed(put)


def pipe_all_s(filesystem: Any, blobs: Mapping[str, bytes]) -> float:
    """Seconds in which s3fs puts every blob at once, with the settings that it comes with."""
    placed = {f"{BUCKET}/piped/{index}": data for index, data in enumerate(blobs.values())}
    return timed(lambda: filesystem.pipe(placed))


def _put_each_s(store: Any, tensors: Sequence[torch.Tensor]) -> float:
    """Seconds in which obstore puts each tensor's bytes as an object of its own, one after the other."""
    payloads = [bytes(raw(tensor)) for tensor in tensors]

    def put() -> None:
        for index, data in enumerate(payloads):
            store.put(f"each/{index}", data)

    return timed(put)
