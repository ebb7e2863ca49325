"""Ranges of many files are hashed together, and one that is wrong costs no other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tlcore.errors import MissingError, ReadError
from tlcore_backends.safetensors.hash_queue import HashQueue, Wanted
from tlcore_backends.safetensors.segment_files import SegmentFiles
from tlcore_backends.storage.local import LocalStore

_LONG = 30


def test_each_file_has_its_own_digests_whatever_the_others_are(tmp_path: Path) -> None:
    contents = {f"f{number}": bytes([number]) * (1000 + number) for number in range(50)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "f7").unlink()
    (tmp_path / "f8").write_bytes(contents["f8"][:500])
    (tmp_path / "f9").unlink()
    (tmp_path / "f9").mkdir()
    files = SegmentFiles(LocalStore(tmp_path))
    pairs = [(0, 300), (300, 800), (900, 950)]
    sizes: list[int] = []

    def hash_many(wanted: Sequence[Wanted]) -> list[bytes | ReadError]:
        sizes.append(len(wanted))
        return files.hash_many(wanted)

    with ThreadPoolExecutor(2) as pool:
        queue = HashQueue(pool, 2, hash_many)
        told = {name: queue.submit(name, np.array(pairs, np.int64)) for name in contents}
        for name, digests in told.items():
            if name in ("f7", "f9"):
                with pytest.raises(MissingError if name == "f7" else ReadError, match=name):
                    digests.result(_LONG)
                continue
            whole = [xxhash.xxh3_128_digest(contents[name][begin:end]) for begin, end in pairs]
            assert digests.result(_LONG) == b"".join(whole[:1] if name == "f8" else whole)
    assert sum(sizes) == len(contents)


def test_what_waits_is_taken_together_and_told_when_it_is_given_up() -> None:
    begun, go_on = threading.Event(), threading.Event()
    taken: list[int] = []

    def hash_many(wanted: Sequence[Wanted]) -> list[bytes | ReadError]:
        taken.append(len(wanted))
        begun.set()
        assert go_on.wait(_LONG)
        return [name.encode() for name, _ in wanted]

    ranges = np.array([(0, 1)], np.int64)
    with ThreadPoolExecutor(1) as pool:
        queue = HashQueue(pool, 1, hash_many)
        first = queue.submit("0", ranges)
        assert begun.wait(_LONG)
        given_up = queue.submit("given up", ranges)
        queue.cancel()
        others = [queue.submit(str(number), ranges) for number in range(1, 5)]
        go_on.set()
        assert [each.result(_LONG) for each in (first, *others)] == [b"0", b"1", b"2", b"3", b"4"]
        with pytest.raises(CancelledError):
            given_up.result(_LONG)
    assert taken == [1, 4]


def test_who_waits_is_told_of_any_error() -> None:
    def hash_many(wanted: Sequence[Wanted]) -> list[bytes | ReadError]:
        raise RuntimeError("of any kind")

    with ThreadPoolExecutor(1) as pool:
        queue = HashQueue(pool, 1, hash_many)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="of any kind"):
                queue.submit("0", np.array([(0, 1)], np.int64)).result(_LONG)
