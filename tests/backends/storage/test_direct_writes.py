"""Large files of a local place go past the page cache, as long as the disk keeps up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.hotpath.halves import native
from tlcore.config.configuration import load_config
from tlcore.runs.convert import convert
from tlcore_backends.storage import atomic_file
from tlcore_backends.storage.direct_writes import DirectWrites
from tlcore_backends.storage.local import LocalStore

LARGE = os.urandom(6 << 20)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From how many bytes on each write of a large file was to go past the cache."""
    found: list[int] = []

    def write_all(handle: int, parts: Any, *least: int) -> int:
        written = int(native().write_all(handle, parts, *least))
        found.extend(least if written >= 1 << 20 else ())
        return written

    monkeypatch.setattr(atomic_file, "write_all", write_all)
    return found


def test_files_are_whole_behind_a_reserved_place_too(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # However busy the disk is, it seems to keep up.
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    store = LocalStore(tmp_path / "run")
    file = store.begin("large", 1000)
    assert file.write([LARGE, b"small"]) + file.write([b"x"]) + file.write([LARGE[7:]]) == 2 * len(LARGE) - 1
    file.publish(b"h" * 1000)
    assert store.get("large") == b"h" * 1000 + LARGE + b"smallx" + LARGE[7:]
    assert len(asked) == 2 and all(0 < least <= len(LARGE) for least in asked)


def test_a_place_that_is_slow_is_left_to_the_cache(tmp_path: Path, asked: list[int]) -> None:
    store = LocalStore(tmp_path / "run")
    times = iter([0.0, 1.0] + [2.0] * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(times))
        store.put("first", [LARGE])
        store.put("second", [LARGE])
    assert asked[0] > 0 and asked[1:] == [-1]
    assert store.get("first") == store.get("second") == LARGE


def test_what_is_small_says_nothing_of_the_disk() -> None:
    writes = DirectWrites()
    writes.note(1000, 1.0)
    writes.note(6 << 20, 0.001)
    assert writes.least > 0
    writes.note(6 << 20, 1.0)
    assert writes.least == -1


def test_what_is_converted_stays_in_the_cache(tmp_path: Path, asked: list[int]) -> None:
    model = nn.Identity()
    keys: dict[str, Any] = {"backend": "pt", "log_step_ids": []}
    with tlcore.capture(model, output_dir=tmp_path / "captured", **keys) as captured:
        model(torch.arange(2 << 20))
    assert max(asked) > 0
    asked.clear()
    convert(
        tlcore.open_run(captured.url),
        load_config(output_dir=str(tmp_path / "converted"), backend="safetensors"),
    )
    assert asked and set(asked) == {-1}
