"""A run of very many steps: on its way to a store that answers late, how it lies there, and reading it.

``--steps`` says how long the run is whose growth is measured: it is made of small steps, as fast as they go,
but goes through the real pipeline, to a real server.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import fsspec

import tlcore
from tests.adapters.vllm.helpers import ENVIRONMENT, REPOSITORY
from tests.servers import Server, moto

from .long_process import SETTLED_AT
from .object_storage import delayed, obstore_of
from .rows import Row, Scale, at_least, at_most
from .subprocesses import report
from .timing import interleaved, ratio, timed

_DELAYS_S = (0.03, 0.1)
_SHORT_STEPS = 10
# Of the long run, so that it has about as many segments as one whose steps take as long as a model's.
_COMMIT_S = 0.1
_READ_NAME = "0/outputs_cpu"


def table(scale: Scale) -> list[Row]:
    """The loop with each delay, the run that it leaves, the long run, and a whole model's decode."""
    rows: list[Row] = []
    with server() as place:
        for delay_s in _DELAYS_S:
            rows += _loop(place, delay_s, scale)
        rows += _growth(place, scale)
    return rows + _decode(scale)


@contextmanager
def server() -> Iterator[Server]:
    """Moto, in memory."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name, moto(Path(name)) as place:
        yield place


def _backend(place: Server, folder: str, **options: Any) -> dict[str, Any]:
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
        keys = {"backend": _backend(far, f"loop-{delay_s:g}")}
        found = report("long_process", "loop", str(steps), json.dumps(keys))
    sizes = _sizes(place, found["url"])
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
        Row(f"{name}: stored after the loop's end", found["rest_s"], at_most(3), "s", whole),
        Row(f"{name}: steps an object", steps / objects, at_least(10), "", whole),
    ]
    if delay_s == _DELAYS_S[0]:
        run = tlcore.open_run(found["url"], place.options)
        rows.append(_overhead("one layer", sum(sizes.values()), distinct_bytes(run), 1.05))
        rows.append(_reading(place, run, delay_s, scale))
    return rows


def _sizes(place: Server, url: str) -> dict[str, int]:
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


def _overhead(what: str, stored: int, payload: int, limit: float) -> Row:
    detail = f"{stored / 1e6:.2f} MB / {payload / 1e6:.2f} MB"
    return Row(f"stored bytes / distinct payload, {what}", stored / payload, at_most(limit), "times", detail)


def _reading(place: Server, run: tlcore.Run, delay_s: float, scale: Scale) -> Row:
    """One tensor over all steps, against its bytes by one request."""
    url, payload = run.url, run.tensor(_READ_NAME).nbytes
    filesystem = fsspec.filesystem(place.protocol, skip_instance_cache=True, **place.options)
    filesystem.pipe_file(f"{place.url}/plain", bytes(payload))
    with delayed(place, delay_s) as (far, requests):
        plain = obstore_of(far)
        opened = tlcore.open_run(url, far.options)
        opened.tensor(_READ_NAME)
        asked = len(requests)
        times = interleaved(
            {
                "run.tensor": lambda: timed(lambda: opened.tensor(_READ_NAME)),
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


def _growth(place: Server, scale: Scale) -> list[Row]:
    steps = scale.long_steps
    urls = {}
    for count in (_SHORT_STEPS, steps):
        keys = {"backend": _backend(place, f"growth-{count}", commit_s=_COMMIT_S)}
        found = report("long_process", "growth", str(count), json.dumps(keys), timeout_s=3600)
        urls[count] = found["url"]
    requests: dict[int, int] = {}
    with delayed(place, 0) as (counted, asked):

        def read(count: int) -> None:
            before = len(asked)
            run = tlcore.open_run(urls[count], counted.options)
            run.step(count // 2).tensor(f"step_{count // 2}/{_READ_NAME}")
            requests[count] = len(asked) - before

        measures = {str(count): lambda count=count: timed(lambda: read(count)) for count in urls}
        times = interleaved(measures, scale.repeats)
    long, short = (median(times[str(count)]) * 1e3 for count in (steps, _SHORT_STEPS))
    what = f"opening a run of {steps} steps and reading one, beyond the same of {_SHORT_STEPS}"
    objects = len(_sizes(place, urls[steps]))
    mb = 1 << 20
    return [
        Row(f"{what}: requests", requests[steps] - requests[_SHORT_STEPS], at_most(3), "",
            f"{requests[steps]} and {requests[_SHORT_STEPS]}; {objects} objects"),
        Row(f"{what}: time", long - short, at_most(50), "ms", f"{long:.0f} ms and {short:.0f} ms"),
        Row(
            f"memory of a capturing process at step {steps} / at step {SETTLED_AT}",
            found["ended"] / found["settled"],
            at_most(1.02),
            "times",
            f"{found['ended'] / mb:.1f} MiB / {found['settled'] / mb:.1f} MiB;"
            f" {found['step_s'] * 1e6:.0f} us a step",
        ),
    ]  # fmt: skip


def _decode(scale: Scale) -> list[Row]:
    """A whole model's decode to the local disk: its size, and its calls to the file system."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        keys = json.dumps({"output_dir": name, "backend": "safetensors"})
        command = ["decode", scale.name, keys]
        traced = shutil.which("strace") is not None
        if traced:
            calls = _traced_calls(name, command)
        else:
            report("long_process", *command)
        (url,) = Path(name).iterdir()
        stored = sum(path.stat().st_size for path in url.rglob("*") if path.is_file())
        rows = [_overhead("a whole model's decode", stored, distinct_bytes(tlcore.open_run(url)), 1.02)]
        files = sum(1 for path in url.rglob("*") if path.is_file())
    if traced:
        per_step = calls / scale.decode_steps
        what = f"calls to the file system a step, {scale.decode_steps} decode steps, all modules"
        rows.append(Row(what, per_step, at_most(4), "", f"{calls} calls, {files} files"))
    return rows


def _traced_calls(directory: str, command: list[str]) -> int:
    """How many system calls of a capture name the run's directory, or a file that lies in it."""
    with tempfile.NamedTemporaryFile("r", prefix="tlcore-bench-") as log:
        program = [sys.executable, "-m", f"{__package__}.long_process", *command]
        tracing = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", "trace=%file,%desc", "-o", log.name]
        done = subprocess.run(
            [*tracing, *program],
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the traced capture failed:\n{done.stderr[-4000:]}")
        # Each line begins with the process's id; the program's own arguments name the directory, too.
        return sum(directory in line for line in log if "execve(" not in line and "resumed>" not in line)
