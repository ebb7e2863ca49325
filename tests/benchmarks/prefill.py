"""A 256-token prefill with all modules captured, under transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from .capturing import (
    Memcpy,
    capturing,
    distinct,
    distinct_placed,
    forward_saving_s,
    forward_with_idle_hooks_s,
    save_each_s,
    size_of,
    write_plainly_s,
)
from .rows import Row, Scale, at_least, at_most
from .timing import Times, added, interleaved, ratio, timed
from .workload import Workload, workload

_LIMITS = {"pt": "torch.save", "safetensors": "os.write"}


def table(scale: Scale) -> list[Row]:
    """Time added to the forward, time to the commit, bytes stored."""
    work = workload("prefill", scale)
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        return [
            *_added(work, directory, scale),
            *_to_commit(work, directory, scale),
            *_stored(work, directory),
        ]


def _added(work: Workload, directory: Path, scale: Scale) -> list[Row]:
    memcpy = Memcpy(work.tensors())
    with (
        capturing(work, directory, backend="pt") as pt,
        capturing(work, directory, backend="safetensors") as safetensors,
    ):
        times = interleaved(
            {
                "plain": lambda: timed(work.forward),
                "memcpy": memcpy.seconds,
                "idle hooks": lambda: forward_with_idle_hooks_s(work),
                "pt": pt.forward_s,
                "safetensors": safetensors.forward_s,
                "torch.save": lambda: forward_saving_s(work, directory),
            },
            scale.repeats,
        )
    idle = _relative("no-op hooks / plain forward", times, "idle hooks")
    return [idle, *added_rows(times, "", size_of(work.tensors()))]


def added_rows(times: Times, where: str, captured_bytes: int) -> list[Row]:
    """What capture by each backend adds to a plain forward, in memcpys and against saving in hooks."""
    memcpy = median(times["memcpy"])
    saving = added(times, "torch.save", "plain")
    rows = []
    for backend in _LIMITS:
        extra = added(times, backend, "plain")
        copied = f"memcpy {_ms(times, 'memcpy')} for {captured_bytes / 1e6:.0f} MB"
        figures = f"{_ms(times, backend)} - {_ms(times, 'plain')}, {copied}"
        rows += [
            Row(
                f"added to a captured prefill{where}, {backend}",
                extra / memcpy,
                at_most(2.0),
                "memcpys",
                figures,
            ),
            Row(
                f"synchronous torch.save / {backend}{where}, time added",
                saving / max(extra, 1e-6),
                at_least(15),
                "times",
                f"{saving * 1e3:.0f} ms / {extra * 1e3:.1f} ms",
            ),
        ]
    return rows


def _to_commit(work: Workload, directory: Path, scale: Scale) -> list[Row]:
    placed = distinct_placed(work.placed())
    tensors = [tensor for _, tensor in placed]
    with (
        capturing(work, directory, backend="pt") as pt,
        capturing(work, directory, backend="safetensors") as safetensors,
    ):
        times = interleaved(
            {
                "os.write": lambda: write_plainly_s(tensors, directory),
                "torch.save": lambda: save_each_s(placed, directory),
                "pt": pt.commit_s,
                "safetensors": safetensors.commit_s,
            },
            scale.repeats,
        )
    return [
        Row(
            f"last hook to commit, {backend} / {limit} of the distinct tensors",
            ratio(times, backend, limit),
            at_most(1.5),
            "times",
            f"{_ms(times, backend)} / {_ms(times, limit)} for {size_of(tensors) / 1e6:.0f} MB",
        )
        for backend, limit in _LIMITS.items()
    ]


def _stored(work: Workload, directory: Path) -> list[Row]:
    tensors = work.tensors()
    payload = size_of(distinct(tensors))
    rows = []
    for backend in _LIMITS:
        with capturing(work, directory, backend=backend) as capture:
            capture.forward()
        states = [file.stat() for file in capture.path.rglob("*") if file.is_file()]
        stored = sum({state.st_ino: state.st_size for state in states}.values())
        figures = f"{stored / 1e6:.1f} MB of {size_of(tensors) / 1e6:.0f} MB captured"
        what = f"bytes stored / distinct bytes, {backend}"
        rows.append(Row(what, stored / payload, at_most(1.02), "", figures))
    return rows


def _relative(what: str, times: Times, name: str) -> Row:
    return Row(what, ratio(times, name, "plain"), None, "", f"{_ms(times, name)} / {_ms(times, 'plain')}")


def _ms(times: Times, name: str) -> str:
    return f"{median(times[name]) * 1e3:.1f} ms"
