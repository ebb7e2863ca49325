"""``tlcore verify`` and ``tlcore convert`` against reading, and writing, the same bytes plainly.

A tree of files that was made is not removed before all is measured: an ext4 without a journal uses no inode
again for minutes, and looks at each that was freed before it makes a file, which then takes thirty times as
long.
"""

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
# Every tree of files that is made stays until the end.
_MOST_STEPS = 20
# Of segments, which are few files, a run as long as shows what each step costs, beside what a run does.
_LONG = 10


def table(scale: Scale) -> list[Row]:
    """A prefill, and decode steps of other tokens each, per backend: verified, and converted to the other.

    Of segments more steps are verified, too.
    """
    kinds: tuple[tuple[Kind, int], ...] = (("prefill", 1), ("decode", min(_MOST_STEPS, scale.decode_steps)))
    rows = []
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        for kind, steps in kinds:
            for backend in _OTHER:
                run = _captured(kind, steps, backend, directory, scale)
                rows += _rows(f"{kind} ({steps} steps)", run, backend, directory, scale)
        steps = _LONG * min(_MOST_STEPS, scale.decode_steps)
        run = _captured("decode", steps, "safetensors", directory, scale)
        rows.append(_verified(f"decode ({steps} steps)", run, "safetensors", scale))
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
    buffer = bytearray(max(map(os.path.getsize, files)))
    target = _Targets(directory / f"{run.parent.name}-{run.name}", keeps=other == "pt")
    plain = _Plain(files, buffer, _convert(run, other, target.next()))
    calls = _reads(run, files, buffer) | {
        "convert": lambda: target.timed(lambda place: _convert(run, other, place)),
        "plain": lambda: target.timed(plain.make),
    }
    times = interleaved({name: clock.measure(name, call) for name, call in calls.items()}, scale.repeats)
    converted = f"convert, {backend} to {other}, {what}"
    return [
        _verify_row(what, backend, times, clock),
        _row(f"{converted} / the same files plainly", times, clock, "convert", "plain", "", _CONVERT_LIMIT),
    ]


def _verified(what: str, run: Path, backend: str, scale: Scale) -> Row:
    files, clock = _files(run), _Clock()
    calls = _reads(run, files, bytearray(max(map(os.path.getsize, files))))
    times = interleaved({name: clock.measure(name, call) for name, call in calls.items()}, scale.repeats)
    return _verify_row(what, backend, times, clock)


def _reads(run: Path, files: Sequence[str], buffer: bytearray) -> dict[str, Callable[[], float]]:
    return {
        "reading": lambda: timed(lambda: _read(files, buffer)),
        "in pieces": lambda: timed(lambda: _read(files, bytearray(256 << 10))),
        "verify": lambda: timed(lambda: tlcore.open_run(run).verify()),
    }


def _verify_row(what: str, backend: str, times: dict[str, list[float]], clock: _Clock) -> Row:
    small = f"; by pieces of 256 KiB {median(times['in pieces']) * 1e3:.0f} ms"
    name = f"verify, {backend}, {what} / reading into a used buffer"
    return _row(name, times, clock, "verify", "reading", small, _VERIFY_LIMITS[backend])


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


def _files(run: Path) -> list[str]:
    """Every file of a run, one name of each."""
    found = {file.stat().st_ino: str(file) for file in sorted(run.rglob("*")) if file.is_file()}
    return list(found.values())


def _read(files: Sequence[str], buffer: bytearray) -> None:
    """One thread reads every file, one after the other, into the same memory.

    By calls of the system alone: a file object would cost as much again as opening a small file.
    """
    view = memoryview(buffer)
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        begin = 0
        while count := os.readv(handle, [view[begin:] or view]):
            begin = (begin + count) % len(view)
        os.close(handle)


def _convert(run: Path, backend: str, target: Path) -> Path:
    config = load_config(output_dir=str(target), backend=_BACKENDS[backend])
    return Path(convert(tlcore.open_run(run), config))


class _Plain:
    """Reads a run's files and makes those that converting makes, of the same names, sizes and links."""

    def __init__(self, files: Sequence[str], buffer: bytearray, made: Path) -> None:
        self._files, self._buffer = files, buffer
        self._names: list[tuple[str, int, str | None]] = []
        first: dict[int, str] = {}
        for file in sorted(made.rglob("*")):
            if file.is_file():
                state, name = file.stat(), str(file.relative_to(made))
                known = first.setdefault(state.st_ino, name)
                self._names.append((name, state.st_size, None if known is name else known))
        self._directories = sorted({os.path.dirname(name) for name, _, _ in self._names})
        self._content = memoryview(bytes(max(size for _, size, _ in self._names)))

    def make(self, place: Path) -> None:
        """Read, and write, all of it."""
        _read(self._files, self._buffer)
        target = str(place)
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


class _Targets:
    """Directories to make runs in, each in its turn; what has few files is removed at once."""

    def __init__(self, directory: Path, keeps: bool) -> None:
        self._directory, self._keeps = directory, keeps
        self._count = 0

    def next(self) -> Path:
        """Another one."""
        self._count += 1
        return self._directory / str(self._count)

    def timed(self, make: Callable[[Path], object]) -> float:
        """Seconds of making a run."""
        place = self.next()
        seconds = timed(lambda: make(place))
        if not self._keeps:
            shutil.rmtree(place)
        return seconds
