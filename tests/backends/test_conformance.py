"""Every built-in backend and store passes the suites that tlcore ships for third parties."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.backends.raw import committed
from tlcore.errors import BackendError
from tlcore.protocols import Sink, Store
from tlcore.record import tensor_from_bytes
from tlcore.registry import open_store
from tlcore.testing import FailingStore, MemoryStore, SinkConformance, SlowStore, StoreConformance, Tensors
from tlcore_backends.fsspec import make_sink
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.segment_source import SegmentSource
from tlcore_backends.safetensors.sink import SafetensorsSink
from tlcore_backends.storage.local import LocalStore
from tlcore_backends.storage.remote import FsspecStore

_fresh = itertools.count()


class _Readable(SinkConformance):
    """Reads what a built-in sink wrote."""

    def committed(self, url: str) -> Mapping[int, Tensors]:
        return committed(open_store(url))


class TestPt(_Readable):
    def make_sink(self) -> Sink:
        return PtSink()


class TestSafetensors(_Readable):
    def make_sink(self) -> Sink:
        return SafetensorsSink()


class TestSmallShards(_Readable):
    def make_sink(self) -> Sink:
        return SafetensorsSink(shard_bytes=40)


class TestFsspecPt(_Readable):
    def make_sink(self) -> Sink:
        return make_sink("pt")

    def make_url(self, tmp_path: Path) -> str:
        return f"memory://conformance-{next(_fresh)}/run"


class TestFsspecSafetensors(TestFsspecPt):
    def make_sink(self) -> Sink:
        return make_sink("safetensors", layout=1)


class TestSegments(SinkConformance):
    def make_sink(self) -> Sink:
        return make_sink("safetensors", layout=2)

    def committed(self, url: str) -> Mapping[int, Tensors]:
        source = SegmentSource(open_store(url), {"state": "running"})
        found = {}
        for step in source.steps:
            records = source.document(step, 0)["records"]
            found[step] = {
                record["name"]: tensor_from_bytes(
                    bytearray(source.read(record)), getattr(torch, record["dtype"]), record["shape"]
                )
                for record in records
            }
        return found


class TestSmallSegments(TestSegments):
    def make_sink(self) -> Sink:
        return SegmentSink(segment_bytes=40)


class TestRemoteSegments(TestSegments):
    def make_url(self, tmp_path: Path) -> str:
        return f"memory://conformance-{next(_fresh)}/run"


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
