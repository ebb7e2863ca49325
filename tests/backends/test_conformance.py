"""Every built-in backend and store passes the suites that tlcore ships for third parties."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from tests.backends.raw import committed
from tlcore.errors import BackendError
from tlcore.protocols import Sink, Store
from tlcore.registry import open_store
from tlcore.testing import (
    BackendConformance,
    FailingStore,
    MemoryStore,
    SinkConformance,
    SlowStore,
    StoreConformance,
    Tensors,
)
from tlcore_backends.safetensors.sink import SafetensorsSink
from tlcore_backends.storage.local import LocalStore
from tlcore_backends.storage.remote import FsspecStore

_fresh = itertools.count()


class TestPt(BackendConformance):
    backend = "pt"


class TestSafetensors(BackendConformance):
    backend = "safetensors"


class TestSmallShards(BackendConformance):
    backend = "safetensors"
    options: ClassVar = {"shard_bytes": 40}


class _InMemory(BackendConformance):
    """Built-in formats in object storage."""

    backend = "fsspec"

    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        self.parent = f"memory://conformance-{next(_fresh)}"

    def make_output_dir(self, tmp_path: Path) -> str:
        return self.parent


class TestFsspecPt(_InMemory):
    options: ClassVar = {"format": "pt"}


class TestFsspecSafetensors(_InMemory):
    options: ClassVar = {"format": "safetensors"}


class TestSinkAlone(SinkConformance):
    """The suite of those who only write."""

    def make_sink(self) -> Sink:
        return SafetensorsSink()

    def committed(self, url: str) -> Mapping[int, Tensors]:
        return committed(open_store(url))


class TestSegments(BackendConformance):
    backend = "safetensors"
    options: ClassVar = {"layout": 2}


class TestSmallSegments(BackendConformance):
    backend = "safetensors"
    options: ClassVar = {"layout": 2, "segment_bytes": 40}


class TestRemoteSegments(_InMemory):
    options: ClassVar = {"format": "safetensors", "layout": 2}


class TestLocalStore(StoreConformance):
    def make_store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "root")


class TestMemoryProtocol(StoreConformance):
    def make_store(self, tmp_path: Path) -> Store:
        return FsspecStore(f"memory://conformance-{next(_fresh)}")


class TestFileProtocol(StoreConformance):
    def make_store(self, tmp_path: Path) -> Store:
        return FsspecStore(f"file://{tmp_path}/root")


class TestMemoryStore(StoreConformance):
    def make_store(self, tmp_path: Path) -> Store:
        return MemoryStore()


class TestSlowStore(StoreConformance):
    def make_store(self, tmp_path: Path) -> Store:
        return SlowStore(MemoryStore(), delay_s=0.001)


class TestFailingStore(StoreConformance):
    def make_store(self, tmp_path: Path) -> Store:
        return FailingStore(MemoryStore(), failures=0)


def test_a_failing_store_fails_as_often_as_told() -> None:
    store = FailingStore(MemoryStore(), methods=["put", "get"], failures=2)
    with pytest.raises(BackendError, match="put of 'a' fails on purpose"):
        store.put("a", [b"x"])
    store.delete("a")
    with pytest.raises(BackendError):
        store.get("a")
    assert store.put("a", [b"x"]) == 1
    assert store.calls == 4


def test_file_urls_and_paths_are_the_local_disk(tmp_path: Path) -> None:
    for place in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        store = open_store(place)
        assert isinstance(store, LocalStore)
        assert store.url == str(tmp_path)
