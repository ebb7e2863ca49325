"""A run in SeaweedFS as a shuffled data set, against a plain client that reads the same bytes in order."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import obstore
import torch
from torch import nn

import tlcore
from tests.servers import BUCKET, seaweedfs
from tlcore.engine.capture import capture

from .object_storage import REGION, obstore_of
from .rows import Row, Scale, at_least, at_most
from .subprocesses import print_report, report
from .timing import Measure, Times, interleaved, ratio

_WIDTH = 2048
_SAMPLES, _LENGTH = 8, 512
STEP_BYTES = _SAMPLES * _LENGTH * _WIDTH * 2
_BATCH = 4096
NAME = "embed/outputs"


class _Embeds(nn.Module):
    """A row of it tells which token it is of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(4096, _WIDTH, dtype=torch.bfloat16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.embed(input_ids)


def table(scale: Scale) -> list[Row]:
    """Rows a second of all batches of an epoch, and the memory that a process has for it at most."""
    steps = {"full": 64, "quick": 32, "tiny": 1}[scale.name]
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name, seaweedfs(Path(name)) as server:
        # With a region both read by the same client.
        options = {**server.options, **REGION}
        backend = {"name": "fsspec", "format": "safetensors", "storage_options": options}
        url = captured(f"{server.url}/sets", backend, steps)
        plain = obstore_of(server)
        files = fsspec.filesystem("s3", skip_instance_cache=True, **server.options).find(
            f"{url.removeprefix('s3://')}/segments"
        )
        paths = [each.removeprefix(f"{BUCKET}/") for each in files if each.endswith(".safetensors")]
        data = tlcore.open_run(url, options).dataset(NAME)
        _check(data)
        spent: Times = {"data set": [], "plain": []}
        times = interleaved(
            {
                "data set": lambda: _noting(spent["data set"], lambda: _read_s(data)),
                "plain": lambda: _noting(spent["plain"], lambda: _plain_s(plain, paths)),
            },
            max(2, scale.repeats // 3),
        )
        memory = report(
            "dataset", url, server.options["endpoint_url"], server.options["key"], server.options["secret"]
        )
    total = steps * STEP_BYTES
    speeds = ", ".join(f"{each} {total / min(seconds) / 1e6:.0f}" for each, seconds in times.items())
    return [
        Row(
            "SeaweedFS, shuffled rows a second / the same bytes plainly in order",
            ratio(times, "plain", "data set"),
            at_least(0.7),
            "times",
            f"MB/s: {speeds}; {total / 1e6:.0f} MB, {len(data)} rows of {_WIDTH * 2} bytes",
        ),
        Row(
            "the same in processor time, without the server's",
            ratio(spent, "data set", "plain"),
            None,
            "times",
            ", ".join(f"{each} {min(seconds) / total * 1e9:.2f} s a GB" for each, seconds in spent.items()),
        ),
        Row(
            "memory of an epoch, MB",
            memory["bytes"] / 1e6,
            at_most(512),
            "",
            "more than before the run was opened",
        ),
    ]


def captured(output_dir: str, backend: Any, steps: int) -> str:
    """A run of so many steps of 8 samples each; returns its URL."""
    model = _Embeds()
    keys: dict[str, Any] = {"output_dir": output_dir, "backend": backend, "log_step_ids": []}
    with torch.inference_mode(), capture(model, module_call_match="embed", block_s=600, **keys) as made:
        for step in range(steps):
            ids = torch.randint(4096, (_SAMPLES, _LENGTH), generator=torch.Generator().manual_seed(step))
            model(ids, attention_mask=torch.ones_like(ids))
    return made.url


def _check(data: Any) -> None:
    """What is read must be right, or it is not worth measuring."""
    weight = _Embeds().embed.weight
    batch = next(iter(data.loader(_BATCH)))
    if not torch.equal(batch[NAME], weight[batch["token_ids"]]):
        raise RuntimeError("rows do not belong to their tokens")


def _read_s(data: Any) -> float:
    begin = time.perf_counter()
    rows = sum(len(batch["positions"]) for batch in data.loader(_BATCH))
    if rows != len(data):
        raise RuntimeError(f"{rows} rows of {len(data)}")
    return time.perf_counter() - begin


def _plain_s(store: Any, paths: list[str]) -> float:
    begin = time.perf_counter()
    for path in paths:
        bytes(obstore.get(store, path).bytes())
    return time.perf_counter() - begin


def _noting(spent: list[float], read: Measure) -> float:
    """The seconds of a read, with the processor time that this process took for it noted."""
    begin = time.process_time()
    seconds = read()
    spent.append(time.process_time() - begin)
    return seconds


def _memory(url: str, endpoint: str, key: str, secret: str) -> dict[str, int]:
    """How much more memory an epoch takes than opening a small data set did."""
    from .memory_process import forget_peak, peak_rss

    forget_peak()
    before = peak_rss()
    options = {"endpoint_url": endpoint, "key": key, "secret": secret, **REGION}
    data = tlcore.open_run(url, options).dataset(NAME)
    _read_s(data)
    return {"bytes": peak_rss() - before}


if __name__ == "__main__":
    import sys

    print_report(_memory(*sys.argv[1:]))
