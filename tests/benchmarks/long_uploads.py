"""Segments to SeaweedFS, against plain clients that put the same bytes in large blobs."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import torch
from torch import nn

from tests.servers import Server, seaweedfs
from tlcore.engine.capture import capture

from .object_storage import REGION, obstore_of, pipe_all_s, put_all_s
from .rows import Row, Scale, at_least, at_most
from .timing import interleaved, ratio, timed

_BLOB_BYTES = 128 << 20
_STEP_BYTES = 16 << 20
_AT_ONCE = 4
_NEW = "obstore, new memory"


def table(scale: Scale) -> list[Row]:
    """MB/s from a step until everything is stored, and of the clients; how many objects there are.

    Of a capture twice: from its first step on, when its memory is new, and once that has been used. The
    clients' bytes have been in memory all the time, but for one that copies each blob before it puts it, as
    whoever keeps a model's tensors has to.
    """
    blobs = {"full": 8, "quick": 4, "tiny": 1}[scale.name]
    total = blobs * _BLOB_BYTES
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name, seaweedfs(Path(name)) as server:
        steps = _Steps(server, total)
        store = obstore_of(server)
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **server.options)
        plain = {str(number): torch.randn(_BLOB_BYTES // 4).numpy().tobytes() for number in range(blobs)}
        times = interleaved(
            {
                "tlcore": steps.capture_s,
                "obstore": lambda: put_all_s(store, plain),
                _NEW: lambda: _put_new_s(store, plain),
                f"obstore, {_AT_ONCE} at once": lambda: _put_at_once_s(store, plain),
                "s3fs": lambda: pipe_all_s(filesystem, plain),
            },
            max(2, scale.repeats // 2),
        )
        objects = len(filesystem.find(steps.url.partition("://")[2]))
    clients = [seconds for client, seconds in times.items() if client not in ("tlcore", _NEW)]
    times["fastest"] = [min(each) for each in zip(*clients, strict=True)]
    times["tlcore, first"] = steps.first_s[-len(times["tlcore"]) :]
    speeds = ", ".join(
        f"{client} {total / median(seconds) / 1e6:.0f}"
        for client, seconds in times.items()
        if client != "fastest"
    )
    what = "SeaweedFS, segments, MB/s / fastest plain client's with 128 MiB blobs"
    return [
        Row(
            what,
            ratio(times, "fastest", "tlcore"),
            at_least(0.95),
            "times",
            f"MB/s: {speeds}; {total / 1e6:.0f} MB",
        ),
        Row(
            f"{what}, in memory that is new",
            ratio(times, "fastest", "tlcore, first"),
            at_least(0.95),
            "times",
        ),
        Row(
            f"{what}, in memory that is new to both",
            ratio(times, _NEW, "tlcore, first"),
            at_least(0.95),
            "times",
        ),
        Row(
            "SeaweedFS, objects for each 56 MiB where size closes segments",
            objects / (2 * total / (56 << 20)),
            at_most(1),
            "",
            f"{objects} objects",
        ),
    ]


class _Tensor(nn.Module):
    """Gives a tensor, another one for each number."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(_STEP_BYTES // 4 // 1024, 1024)

    def forward(self, number: float) -> torch.Tensor:
        """The tensor: what is captured is what is stored."""
        self.x[0] = number
        return self.x


class _Steps:
    """Captures whose model only gives a tensor; every step's is another one."""

    def __init__(self, server: Server, total: int) -> None:
        self._backend: dict[str, Any] = {
            "name": "fsspec",
            "format": "safetensors",
            "url": f"{server.url}/runs",
            "storage_options": {**server.options, **REGION},
        }
        self._model = nn.Sequential(_Tensor())
        self._steps = total // _STEP_BYTES
        self._number = 0
        self.first_s: list[float] = []
        self.url = ""

    def capture_s(self) -> float:
        """Seconds from a step until that and all that follow are stored; `first_s` are those of the first."""
        keys: dict[str, Any] = {"backend": self._backend, "log_step_ids": [], "module_call_match": "^0$"}
        with torch.no_grad(), capture(self._model, **keys, block_s=600) as captured:
            self.first_s.append(timed(lambda: self._capture(captured)))
            seconds = timed(lambda: self._capture(captured))
        counts = captured.ledger
        if counts.stored != counts.captured:
            raise RuntimeError(f"not everything was stored: {counts.to_json()}")
        self.url = captured.url
        return seconds

    def _capture(self, captured: capture) -> None:
        for _ in range(self._steps):
            self._number += 1
            self._model(float(self._number))
        captured.session.flush()


def _put_new_s(store: Any, blobs: dict[str, bytes]) -> float:
    """Seconds in which obstore puts the blobs, each from a copy in memory that is new."""
    begin = time.perf_counter()
    for name, data in blobs.items():
        store.put(f"new/{name}", bytes(memoryview(data)))
    return time.perf_counter() - begin


def _put_at_once_s(store: Any, blobs: dict[str, bytes]) -> float:
    """Seconds in which several threads put the blobs with obstore."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda each: store.put(f"at-once/{each[0]}", each[1]), blobs.items()))
    return time.perf_counter() - begin
