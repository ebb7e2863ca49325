"""Capture of single forwards of a workload, and the plain ways of doing the same."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.ledger import Counts

from .timing import timed
from .workload import Workload, hooked

_MOST_FORWARDS = 5000


class Capture:
    """A run into which single forwards are captured; between them no hook is on the model."""

    def __init__(self, work: Workload, directory: Path, **keys: Any) -> None:
        # Every second step is selected, so that each captured one takes its hooks away.
        steps = list(range(0, 2 * _MOST_FORWARDS, 2))
        config = load_config({"output_dir": str(directory), "log_step_ids": steps, **keys})
        self._session = Session(config, new_run(config))
        self._session.attach(work.model)
        self._work = work
        self._next = 0
        self.path = Path(self._session.url)

    def forward(self) -> tuple[float, float]:
        """Seconds of one captured forward, and from its last hook until the step is committed."""
        session = self._session
        begin = time.perf_counter()
        session.begin_step(self._next)
        self._work.forward()
        last_hook = time.perf_counter()
        session.end_step()
        handed_over = time.perf_counter()
        session.flush()
        committed = time.perf_counter()
        self._next += 2
        return handed_over - begin, committed - last_hook

    def forward_s(self) -> float:
        """Seconds of one captured forward, until the model could go on; then its files are deleted."""
        seconds, _ = self.forward()
        self.delete_steps()
        return seconds

    def commit_s(self) -> float:
        """Seconds from the last hook of a captured forward until its step is committed."""
        _, seconds = self.forward()
        self.delete_steps()
        return seconds

    def delete_steps(self) -> None:
        """Delete what was written, so that every forward finds the disk alike."""
        for step in self.path.glob("step_*"):
            shutil.rmtree(step)

    def close(self) -> Counts:
        """End the run; its ledger."""
        self._session.close()
        counts = self._session.ledger
        if counts.stored != counts.captured:
            raise RuntimeError(f"not everything was stored: {counts.to_json()}")
        return counts


@contextmanager
def capturing(work: Workload, directory: Path, **keys: Any) -> Iterator[Capture]:
    """A `Capture` that is closed at the end."""
    capture = Capture(work, directory, **keys)
    try:
        yield capture
    finally:
        capture.close()


def distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors without those that repeat the dtype, shape and bytes of an earlier one."""
    return [tensor for _, tensor in distinct_placed([("", tensor) for tensor in tensors])]


def distinct_placed(placed: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """The same, with the place of each one's first occurrence."""
    found: dict[Any, tuple[str, torch.Tensor]] = {}
    for name, tensor in placed:
        key = (tensor.dtype, tensor.shape, xxhash.xxh3_128_digest(raw(tensor)))
        found.setdefault(key, (name, tensor))
    return list(found.values())


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    flat = tensor.contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    """Their bytes."""
    return sum(tensor.nbytes for tensor in tensors)


class Memcpy:
    """The same bytes copied, tensor by tensor, into memory that was touched before: the limit."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._sources = [tensor.contiguous() for tensor in tensors]
        self._target = torch.ones(size_of(tensors), dtype=torch.uint8)

    def seconds(self) -> float:
        """Seconds of one copy of all."""
        places = [(tensor.data_ptr(), tensor.nbytes) for tensor in self._sources]
        target = self._target.data_ptr()
        begin = time.perf_counter()
        for source, size in places:
            ctypes.memmove(target, source, size)
            target += size
        return time.perf_counter() - begin


def write_plainly_s(tensors: Sequence[torch.Tensor], directory: Path) -> float:
    """Seconds in which one thread writes the tensors' bytes into one new file with ``os.write``.

    The file stays, as a captured step does: memory that a removed file has just given back takes new bytes
    many times faster.
    """
    views = [raw(tensor) for tensor in tensors]
    path = directory / f"plain-{time.time_ns()}"

    def write() -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        for view in views:
            while view.nbytes:
                view = view[os.write(handle, view) :]
        os.close(handle)

    return timed(write)


def save_each_s(placed: Sequence[tuple[str, torch.Tensor]], directory: Path) -> float:
    """Seconds in which one thread saves each tensor with ``torch.save``, in its module's directory.

    The files stay, as a captured step does.
    """
    folder = directory / f"saved-{time.time_ns()}"

    def save() -> None:
        for index, (name, tensor) in enumerate(placed):
            path = folder / f"{name}_{index}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tensor, path)

    return timed(save)


def forward_saving_s(work: Workload, directory: Path) -> float:
    """Seconds of a forward whose hooks save every tensor at once with ``torch.save``."""
    folder = directory / "hooked"
    folder.mkdir()
    count = 0

    def save(name: str, direction: str, index: int, tensor: torch.Tensor) -> None:
        nonlocal count
        torch.save(tensor.detach().cpu(), folder / f"{name}-{direction}-{index}-{count}.pt")
        count += 1

    with hooked(work.model, save):
        seconds = timed(work.forward)
    shutil.rmtree(folder)
    return seconds


def forward_with_idle_hooks_s(work: Workload) -> float:
    """Seconds of a forward whose hooks find the tensors and leave them alone."""
    with hooked(work.model, lambda name, direction, index, tensor: None):
        return timed(work.forward)
