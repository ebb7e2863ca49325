"""One layer in every step: on its way to a store that answers late, how it lies there, and reading it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import fsspec

import tlcore
from tests.servers import Server, moto

from .object_storage import delayed, obstore_of
from .rows import Row, Scale, at_least, at_most
from .subprocesses import report
from .timing import interleaved, ratio, timed

_DELAYS_S = (0.03, 0.1)
READ_NAME = "0/outputs_cpu"


def table(scale: Scale) -> list[Row]:
    """The loop with each delay, and the run that it leaves."""
    with server() as place:
        return [row for delay_s in _DELAYS_S for row in _loop(place, delay_s, scale)]


@contextmanager
def server() -> Iterator[Server]:
    """Moto, in memory."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name, moto(Path(name)) as place:
        yield place


def backend_at(place: Server, folder: str, **options: Any) -> dict[str, Any]:
    """Segments below a folder of the server's bucket."""
    return {
        "name": "fsspec",
        "format": "safetensors",
        "url": f"{place.url}/{folder}",
        "storage_options": dict(place.options),
        **options,
    }


def _loop(place: Server, delay_s: float, scale: Scale) -> list[Row]:
    steps = {"full": 1000, "quick": 400, "tiny": 30}[scale.name]
    name = f"{steps} steps of 18 KB, answers {delay_s * 1e3:.0f} ms later"
    with delayed(place, delay_s) as (far, _):
        keys = {"backend": backend_at(far, f"loop-{delay_s:g}")}
        found = report("long_process", "loop", str(steps), json.dumps(keys))
    sizes = sizes_of(place, found["url"])
    objects = len(sizes)
    whole = f"{found['bytes'] / 1e6:.1f} MB in {objects} objects"
    rows = [
        Row(
            f"{name}: loop with capture / without",
            found["captured_s"] / found["plain_s"],
            at_most(1.02),
            "times",
            f"{found['captured_s']:.2f} s / {found['plain_s']:.2f} s",
        ),
        *_shares(name, steps, found),
        Row(f"{name}: stored after the loop's end", found["rest_s"], at_most(3), "s", whole),
        Row(f"{name}: steps an object", steps / objects, at_least(10), "", whole),
    ]
    if delay_s == _DELAYS_S[0]:
        run = tlcore.open_run(found["url"], place.options)
        rows.append(overhead("one layer", sum(sizes.values()), distinct_bytes(run), 1.05))
        rows.append(_reading(place, run, delay_s, scale))
    return rows


def _shares(name: str, steps: int, found: dict[str, Any]) -> list[Row]:
    """What the loop's ratio is made of: the server and the proxy run on the same processors."""
    plain_s = found["plain_s"]
    others_s = found["captured_s"] - plain_s - found["processor_s"] - found["queued_s"]
    shares = {
        "the model's thread on a processor": found["processor_s"],
        "waiting for one, which others have": found["queued_s"],
        "waiting for anything else, such as the interpreter": others_s,
    }
    rows = [
        Row(
            f"{name}: of it, {what}",
            1 + seconds / plain_s,
            None,
            "times",
            f"{seconds / steps * 1e3:.2f} ms a step",
        )
        for what, seconds in shares.items()
    ]
    return [*rows, Row(f"{name}: loop without capture, later / earlier", found["null"], None, "times")]


def sizes_of(place: Server, url: str) -> dict[str, int]:
    """The objects of a run and their sizes in bytes."""
    filesystem = fsspec.filesystem(place.protocol, skip_instance_cache=True, **place.options)
    found: dict[str, int] = filesystem.du(url, total=False)
    return found


def distinct_bytes(run: tlcore.Run) -> int:
    """The bytes of all tensors of a run, those that are equal once."""
    sizes: dict[str, int] = {}
    for step in run.values():
        for record in step.records:
            sizes[record["hash"]] = record["bytes"]
    return sum(sizes.values())


def overhead(what: str, stored: int, payload: int, limit: float) -> Row:
    """How much more is stored than was captured."""
    detail = f"{stored / 1e6:.2f} MB / {payload / 1e6:.2f} MB"
    return Row(f"stored bytes / distinct payload, {what}", stored / payload, at_most(limit), "times", detail)


def _reading(place: Server, run: tlcore.Run, delay_s: float, scale: Scale) -> Row:
    """One tensor over all steps, against its bytes by one request."""
    url, payload = run.url, run.tensor(READ_NAME).nbytes
    filesystem = fsspec.filesystem(place.protocol, skip_instance_cache=True, **place.options)
    filesystem.pipe_file(f"{place.url}/plain", bytes(payload))
    with delayed(place, delay_s) as (far, requests):
        plain = obstore_of(far)
        opened = tlcore.open_run(url, far.options)
        opened.tensor(READ_NAME)
        asked = len(requests)
        times = interleaved(
            {
                "run.tensor": lambda: timed(lambda: opened.tensor(READ_NAME)),
                "plain": lambda: timed(lambda: plain.get_range("plain", start=0, end=payload)),
            },
            scale.repeats,
        )
    tensor_ms, plain_ms = (median(times[name]) * 1e3 for name in ("run.tensor", "plain"))
    detail = f"{payload / 1e6:.1f} MB, {tensor_ms:.0f} ms / {plain_ms:.0f} ms"
    return Row(
        f"run.tensor over all steps / one ranged read, answers {delay_s * 1e3:.0f} ms later",
        ratio(times, "run.tensor", "plain"),
        at_most(1.2),
        "times",
        f"{detail}; {asked} requests with opening",
    )
