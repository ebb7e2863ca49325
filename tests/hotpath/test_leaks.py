"""What the extension keeps over many steps: no reference and no memory more than after the first ones."""

from __future__ import annotations

import gc
import os
import resource
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.deep import scaled
from tests.hotpath.halves import native
from tests.sinks import MemorySink
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.engine.staging.host_memory import Chunk
from tlcore.hotpath import copying, hashing
from tlcore.hotpath.seals import Seal

pytestmark = pytest.mark.slow

STEPS = scaled(250, 5000)


class Part(nn.Module):
    """Its result has another structure each third call, and each fifth call raises."""

    calls = 0

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls % 5 == 0:
            raise ValueError("as it was told to")
        return {"x": (x, 1, None)} if self.calls % 3 else [x, torch.nn.Parameter(x)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            try:
                part(x, [x, {"y": x}], key=x)
            except ValueError:
                continue
        return x


class Nowhere(MemorySink):
    """Keeps nothing."""

    def write(self, batch: Any) -> None:
        hashing.hex_digests([record.data for record in batch])

    def commit_step(self, step: Any) -> None:
        """There is nothing to commit."""


def kept_over(step: Callable[[], None]) -> tuple[int, int]:
    """How many more of Python's objects, and KiB, there are after many steps than after a few.

    The least of three rounds: what leaks grows in each, what other tests of the process left behind once.
    """
    for _ in range(STEPS // 5):
        step()
    rounds = [_grown_by(step) for _ in range(3)]
    return min(objects for objects, _ in rounds), min(memory for _, memory in rounds)


def _grown_by(step: Callable[[], None]) -> tuple[int, int]:
    gc.collect()
    objects, memory = len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(STEPS):
        step()
    gc.collect()
    return len(gc.get_objects()) - objects, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory


def stepping(
    model: nn.Module, x: torch.Tensor, directory: Any, **keys: Any
) -> tuple[Session, Callable[[], None]]:
    """A session of a model, and one captured step of it."""
    config = load_config({"output_dir": str(directory), "log_step_ids": [], **keys})
    session = Session(config, new_run(config), Nowhere(), inline=True)
    session.attach(model)

    def step() -> None:
        session.begin_step()
        model(x)
        session.end_step()

    return session, step


def test_capture_keeps_nothing_of_its_steps(tmp_path: Any) -> None:
    native()
    model, x = Model(), torch.ones(64, 64)
    session, step = stepping(model, x, tmp_path)
    step()
    assert session._hookup.hooks is not None
    calls = [call for each in session._hookup.hooks._listeners for call in each._sites if call is not None]
    sides = [side for call in calls for side in call.inputs.values()]
    words = ["tensor", "scalar", "none", "dict", "outputs", "forward"]
    specs = session._collector._forms._known.values()
    counted = [x, model.parts[0], session._stager.chunk, *words, *calls, *sides, *specs]
    before = [sys.getrefcount(each) for each in counted]
    objects, memory = kept_over(step)
    after = [sys.getrefcount(each) for each in counted]
    assert session.ledger.stored > STEPS * 3 and session.ledger.balanced
    session.close()
    # A reference that one call leaks in each step would be counted STEPS times.
    assert all(new - old < STEPS // 2 for new, old in zip(after, before, strict=True)), (before, after)
    assert objects < STEPS // 4 and memory < 20_000


class Computes(nn.Module):
    """Uses operators as in the step before, but for every third step."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = torch.cat((x, x[..., : self.calls % 3]), -1) * 0.5
        return torch.softmax(y, dim=-1)[0].chunk(2)[0]


def test_operators_keep_nothing_of_their_steps(tmp_path: Any) -> None:
    native()
    model, x = Computes(), torch.ones(8, 8)
    session, step = stepping(model, x, tmp_path, ops=["^"])
    for _ in range(3):
        step()
    operators = session._hookup._audience.operators
    assert operators is not None
    planned = [each for uses in operators._calls.values() for each in uses.planned if each is not None]
    parts = [part for each in planned for part in each]
    counted = [x, model, *planned, *parts, *operators._runs.values(), operators.operands.known]
    before = [sys.getrefcount(each) for each in counted]
    objects, memory = kept_over(step)
    after = [sys.getrefcount(each) for each in counted]
    assert session.ledger.stored > STEPS * 3 and session.ledger.balanced
    session.close()
    assert all(new - old < STEPS // 2 for new, old in zip(after, before, strict=True)), (before, after)
    assert objects < STEPS // 4 and memory < 20_000


def test_the_functions_keep_nothing_of_what_they_get(tmp_path: Any) -> None:
    native()
    path = str(tmp_path / "file")
    parts, target = [b"x" * 1000, bytearray(50)], bytearray(2000)
    paths = [path, str(tmp_path / "none")]
    spans = struct.pack("=9q", *(1050, 9, 1000), *(3, 0, 3), *(1050, 9, 1000))

    ranges = struct.pack("=6q", *(0, 50, 9), *(50, 99, -1))
    placed = struct.pack("=12q", *(1050, 9, 1000, 0), *(3, 0, 3, 0), *(1050, 9, 1000, -1))
    some_rows, matrix = struct.pack("=8q", *(0, 3, 1, 2), *(1, 0, 0, 1)), np.zeros((4, 10), np.uint8)
    room = bytearray(300)
    seals = Seal((0,), 1, 2, 8, 4, 30, (32,)).row(40, 0, 3, 1, 9)
    rows = struct.pack("=21q", *(0, 4, 0, 3, 4, 8, -1), *(0, 0, 0, 0, 0, 0, 0), *(0, 4, 0, 3, 4, 8, -1))

    digits, ranges_of_digits = b"12AAAA", struct.pack("=2q", 2, 6)

    memories, offsets, packed = [Chunk(64), Chunk(64)], [8, 5], bytearray(20)
    places, sizes = struct.pack("=2q", 0, 1), struct.pack("=2q", 20, 20)
    for chunk in memories:
        chunk.view[:] = bytes(64)

    def step() -> None:
        hashing.hex_digests(parts)
        copying.gather(target, [0, 1000], parts)
        with open(path, "wb") as file:
            copying.write_all(file.fileno(), parts)
            copying.write_all(file.fileno(), [target], 0)
        native().read_files(target, str(tmp_path), ["file", "none"], [1050, 3])
        native().identities(paths)
        native().read_texts(str(tmp_path), ["file", "none"], 2000)
        native().hash_payloads(str(tmp_path), ["file", "none", "file"], spans, target)
        native().digest_in_pieces((parts[0],))
        for own in (parts[0], digits, digits.lower()):
            native().decode_spans(own, digits, ranges_of_digits)
        native().count_entries(str(tmp_path), [".", "none"])
        native().list_files(str(tmp_path.parent), tmp_path.name)
        with open(path, "rb") as file:
            native().gather_ranges(file.fileno(), ranges, target)
        native().gather_payloads(str(tmp_path), ["file", "none", "file"], placed, target, target)
        with open(path + " moved", "wb") as file:
            native().move_payloads(str(tmp_path), ["file", "none"], placed[:64], target, room, file.fileno())
        native().read_rows(str(tmp_path), ["file", "none"], 1050, b"", some_rows, matrix)
        native().seal(target, bytes(40), seals, parts[0])
        native().are_sealed(target, bytes(40), seals)
        addresses, _, firsts = native().fingerprint(memories, offsets, places, sizes, sizes)
        native().collect(packed, addresses, sizes, firsts)
        with suppress(FileExistsError):
            native().make_files(str(tmp_path), [], ["made", "link", "made"], rows, target, target)
        for name in ("made", "link"):
            os.unlink(tmp_path / name)
        refused: list[Any] = [[0], [0, 5000], [0, "x"]]
        for wrong in refused:
            with suppress(ValueError, TypeError):
                copying.gather(target, wrong, parts)
            with suppress(ValueError, TypeError, IndexError):
                native().fingerprint(memories, wrong, places, sizes, sizes)
            with suppress(ValueError, TypeError, IndexError):
                native().fingerprint(wrong, offsets, places, sizes, sizes)
            with suppress(ValueError, TypeError):
                native().decode_spans(digits, digits[1:], wrong and ranges_of_digits)
            with suppress(ValueError, TypeError):
                native().hash_payloads(str(tmp_path), wrong, spans, target)
            with suppress(ValueError, TypeError):
                native().gather_payloads(str(tmp_path), wrong, placed, target, target)
            with suppress(ValueError, TypeError):
                native().move_payloads(str(tmp_path), wrong, placed, target, room, -1)
            with suppress(OSError):
                native().move_payloads(str(tmp_path), ["file"], placed[:32], target, room, -1)
            with suppress(ValueError, TypeError):
                native().read_rows(str(tmp_path), wrong, 1050, b"", some_rows, matrix)
            with suppress(ValueError, TypeError, BufferError):
                native().read_rows(str(tmp_path), ["file"], 1050, b"", some_rows, wrong)
            with suppress(ValueError, TypeError):
                native().make_files(str(tmp_path), wrong, [], rows, target, target)

    lists = memories, offsets, packed, places, sizes, *memories
    counted = (
        parts,
        target,
        paths,
        path,
        spans,
        ranges,
        placed,
        room,
        some_rows,
        matrix,
        seals,
        rows,
        digits,
        ranges_of_digits,
        *parts,
        *lists,
    )
    before = [sys.getrefcount(each) for each in counted]
    objects, memory = kept_over(step)
    after = [sys.getrefcount(each) for each in counted]
    assert all(new - old < STEPS // 2 for new, old in zip(after, before, strict=True)), (before, after)
    assert objects < STEPS // 4 and memory < 20_000
