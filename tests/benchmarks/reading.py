"""``tlcore verify`` and ``tlcore convert`` against reading, and writing, the same bytes plainly."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tlcore
from tlcore.config.configuration import load_config
from tlcore.engine.capture import capture
from tlcore.runs.convert import convert

from .rows import Row, Scale, at_most
from .timing import interleaved, ratio, timed
from .workload import Kind, workload

_BACKENDS: dict[str, dict[str, Any]] = {"pt": {"name": "pt"}, "safetensors": {"name": "safetensors"}}
_OTHER = {"pt": "safetensors", "safetensors": "pt"}
_VERIFY_LIMITS = {"pt": 1.3, "safetensors": 1.1}
_CONVERT_LIMIT = 1.3


def table(scale: Scale) -> list[Row]:
    """A prefill, and decode steps of other tokens each, per backend: verified, and converted to the other."""
    kinds: tuple[tuple[Kind, int], ...] = (("prefill", 1), ("decode", scale.decode_steps))
    rows = []
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        for kind, steps in kinds:
            for backend in _OTHER:
                run = _captured(kind, steps, backend, directory, scale)
                rows += _rows(f"{kind} ({steps} steps)", run, backend, directory, scale)
                shutil.rmtree(run)
    return rows


def _captured(kind: Kind, steps: int, backend: str, directory: Path, scale: Scale) -> Path:
    work = workload(kind, scale)
    (name, tokens), *more = work.inputs.items()
    keys: dict[str, Any] = {"log_step_ids": [], "block_s": 600, "output_dir": str(directory)}
    with torch.inference_mode(), capture(work.model, **keys, backend=_BACKENDS[backend]) as captured:
        for step in range(steps):
            work.model(**{name: (tokens + 7 * step) % 499 + 1, **dict(more)})
    return Path(captured.url)


class _Clock:
    """Measures that note the seconds of all the process's threads beside those that pass."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}

    def measure(self, name: str, call: Callable[[], float]) -> Callable[[], float]:
        """``call``, which returns its seconds."""
        self.cpu[name] = []

        def measured() -> float:
            begin = time.process_time()
            seconds = call()
            self.cpu[name].append(time.process_time() - begin)
            return seconds

        return measured


def _rows(what: str, run: Path, backend: str, directory: Path, scale: Scale) -> list[Row]:
    other, clock = _OTHER[backend], _Clock()
    files = _files(run)
    buffer = bytearray(max(file.stat().st_size for file in files))
    made = _convert(run, other, directory)
    plain = _Plain(files, buffer, made, directory)
    shutil.rmtree(made)
    calls: dict[str, Callable[[], float]] = {
        "reading": lambda: timed(lambda: _read(files, buffer)),
        "in pieces": lambda: timed(lambda: _read(files, bytearray(256 << 10))),
        "verify": lambda: timed(lambda: tlcore.open_run(run).verify()),
        "convert": lambda: _removed(lambda: _convert(run, other, directory)),
        "plain": lambda: _removed(plain.make),
    }
    times = interleaved({name: clock.measure(name, call) for name, call in calls.items()}, scale.repeats)
    small = f"; by pieces of 256 KiB {median(times['in pieces']) * 1e3:.0f} ms"
    verify, converted = f"verify, {backend}, {what}", f"convert, {backend} to {other}, {what}"
    return [
        _row(f"{verify} / reading into a used buffer", times, clock, "verify", "reading", small,
             _VERIFY_LIMITS[backend]),
        _row(f"{converted} / the same files plainly", times, clock, "convert", "plain", "", _CONVERT_LIMIT),
    ]  # fmt: skip


def _row(
    what: str, times: dict[str, list[float]], clock: _Clock, upper: str, lower: str, more: str, limit: float
) -> Row:
    shown, cpu = (
        " / ".join(f"{median(each[name]) * 1e3:.0f}" for name in (upper, lower))
        for each in (times, clock.cpu)
    )
    share = ratio(clock.cpu, upper, lower)
    detail = f"{shown} ms; processor {cpu} ms, {share:.2f} times{more}"
    return Row(what, ratio(times, upper, lower), at_most(limit), "times", detail)


def _files(run: Path) -> list[Path]:
    """Every file of a run, one name of each."""
    return list({file.stat().st_ino: file for file in sorted(run.rglob("*")) if file.is_file()}.values())


def _read(files: Sequence[Path], buffer: bytearray) -> None:
    """One thread reads every file, one after the other, into the same memory."""
    view = memoryview(buffer)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            begin = 0
            while count := opened.readinto(view[begin:] or view):
                begin = (begin + count) % len(view)


def _convert(run: Path, backend: str, directory: Path) -> Path:
    target = directory / "made"
    config = load_config(output_dir=str(target), backend=_BACKENDS[backend])
    return Path(convert(tlcore.open_run(run), config))


class _Plain:
    """Reads a run's files and makes those that converting makes, of the same names, sizes and links."""

    def __init__(self, files: Sequence[Path], buffer: bytearray, made: Path, directory: Path) -> None:
        self._files, self._buffer = files, buffer
        self._target = directory / "plain"
        self._names: list[tuple[str, int, str | None]] = []
        first: dict[int, str] = {}
        for file in sorted(made.rglob("*")):
            if file.is_file():
                state, name = file.stat(), str(file.relative_to(made))
                known = first.setdefault(state.st_ino, name)
                self._names.append((name, state.st_size, None if known is name else known))
        self._directories = sorted({os.path.dirname(name) for name, _, _ in self._names})
        self._content = memoryview(bytes(max(size for _, size, _ in self._names)))

    def make(self) -> Path:
        """Read, and write, all of it."""
        _read(self._files, self._buffer)
        target = str(self._target)
        for directory in self._directories:
            os.makedirs(f"{target}/{directory}", exist_ok=True)
        for name, size, link in self._names:
            if link is not None:
                os.link(f"{target}/{link}", f"{target}/{name}")
                continue
            handle = os.open(f"{target}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            view = self._content[:size]
            while view.nbytes:
                view = view[os.write(handle, view) :]
            os.close(handle)
        return self._target


def _removed(make: Callable[[], Path]) -> float:
    """Seconds of making a run, which is removed afterwards."""
    begin = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - begin
    shutil.rmtree(made)
    return seconds
