"""The conformance suite for stores."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..errors import BackendError
from ..storage import (
    Entry,
    Folder,
    Store,
    SupportsAppend,
    SupportsBuffers,
    SupportsFiles,
    SupportsFolders,
    SupportsLevels,
    SupportsNames,
    SupportsOverwrite,
    SupportsPrepare,
    SupportsRemoval,
    SupportsUsage,
    SupportsWaiting,
)


class StoreConformance:
    """What every `Store` must do, and what the store at hand claims to do besides; the rest is skipped.

    Subclass it as ``Test...`` and override `make_store`.
    """

    def make_store(self, tmp_path: Path) -> Store:
        """A new, empty store."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """The store under test, closed afterwards."""
        store = self.make_store(tmp_path)
        yield store
        store.close()

    def test_what_is_put_can_be_got_whole_and_in_part(self, store: Store) -> None:
        """All parts in order, any kind of buffer, and ranges within."""
        assert store.put("step_0/a/t.pt", [b"head", memoryview(b"body"), bytearray(b""), b"tail"]) == 12
        assert store.get("step_0/a/t.pt") == b"headbodytail"
        assert store.get("step_0/a/t.pt", 4, 8) == b"body"
        assert store.get("step_0/a/t.pt", 8) == b"tail"
        assert store.get("step_0/a/t.pt", 8, 8) == b""

    def test_an_empty_blob_is_a_blob(self, store: Store) -> None:
        """Nothing to store is not the same as nothing stored."""
        assert store.put("empty", []) == 0
        assert store.get("empty") == b""
        assert list(store.list()) == [Entry("empty", 0)]

    def test_a_second_put_replaces_the_first(self, store: Store) -> None:
        """The last one wins, whole."""
        store.put("run.json", [b"a longer text"])
        store.put("run.json", [b"short"])
        assert store.get("run.json") == b"short"

    def test_list_takes_any_prefix(self, store: Store) -> None:
        """A directory, a part of a name, nothing, and a prefix that nothing has."""
        for name in ("run.json", "step_0/a/t.pt", "step_0/step.json", "step_01/step.json"):
            store.put(name, [b"1234"])
        assert sorted(store.list()) == [
            *(Entry("run.json", 4), Entry("step_0/a/t.pt", 4)),
            *(Entry("step_0/step.json", 4), Entry("step_01/step.json", 4)),
        ]
        assert sorted(e.name for e in store.list("step_0/")) == ["step_0/a/t.pt", "step_0/step.json"]
        assert len(list(store.list("step_0"))) == 3
        assert list(store.list("step_7/")) == []

    def test_a_store_without_blobs_lists_none(self, store: Store) -> None:
        """Before the first put."""
        assert list(store.list()) == []

    def test_a_copy_is_the_same_blob_and_replaces(self, store: Store) -> None:
        """The copy outlives and does not follow its original."""
        store.put("a", [b"same"])
        store.put("d/b", [b"old"])
        store.copy("a", "d/b")
        store.copy("a", "d/c")
        store.put("a", [b"other"])
        assert (store.get("d/b"), store.get("d/c")) == (b"same", b"same")

    def test_a_missing_name_is_a_file_not_found(self, store: Store) -> None:
        """For get and copy; delete does not mind."""
        store.put("a", [b"x"])
        with pytest.raises(FileNotFoundError):
            store.get("missing")
        with pytest.raises(FileNotFoundError):
            store.copy("missing", "b")
        store.delete("missing")

    def test_delete_removes_one_blob(self, store: Store) -> None:
        """And only that one."""
        store.put("a", [b"x"])
        store.put("ab", [b"y"])
        store.delete("a")
        assert list(store.list()) == [Entry("ab", 1)]

    @pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a//b", "./a"])
    def test_no_name_leaves_the_root(self, store: Store, name: str) -> None:
        """Such a name is an error before anything is touched."""
        with pytest.raises(BackendError):
            store.put(name, [b""])

    def test_names_keep_every_safe_character(self, store: Store) -> None:
        """Nothing is taken for a pattern, a query or an escape."""
        name = "step_0/layers.0(x)[1],a=b@c+d-e/outputs_%2A%7E~2_cpu.pt"
        store.put(name, [b"x"])
        assert store.get(name) == b"x"
        assert [entry.name for entry in store.list("step_0/")] == [name]

    def test_a_level_is_what_lies_directly_in_a_directory(self, store: Store) -> None:
        """For a store that `SupportsLevels`."""
        if not isinstance(store, SupportsLevels):
            pytest.skip("it does not claim levels")
        assert store.level() == ([], [])
        for name in ("run.json", "step_0/a/t.pt", "step_0/step.json", "step_01/step.json"):
            store.put(name, [b"1234"])
        blobs, directories = store.level()
        assert (blobs, sorted(directories)) == ([Entry("run.json", 4)], ["step_0", "step_01"])
        assert store.level("step_0") == ([Entry("step_0/step.json", 4)], ["step_0/a"])
        assert store.level("missing") == ([], [])

    def test_names_are_those_that_are_listed(self, store: Store) -> None:
        """For a store that `SupportsNames`."""
        if not isinstance(store, SupportsNames):
            pytest.skip("it does not claim names")
        assert not store.names()
        for name in ("run.json", "step_0/a/t.pt", "step_0/step.json", "step_01/step.json"):
            store.put(name, [b"1234"])
        for prefix in ("", "step_0", "step_0/", "step_0/a/", "missing/"):
            assert sorted(store.names(prefix)) == sorted(each.name for each in store.list(prefix))

    def test_a_file_is_the_blob(self, store: Store) -> None:
        """For a store that `SupportsFiles`."""
        if not isinstance(store, SupportsFiles):
            pytest.skip("its blobs are no files of this machine")
        store.put("d/a", [b"content"])
        store.copy("d/a", "d/b")
        store.put("d/c", [b"content"])
        assert Path(store.path("d/a")).read_bytes() == b"content"
        assert Path(store.path()) in Path(store.path("d/a")).parents
        with store.open_file("d/a") as file:
            assert file.read() == b"content"
        with pytest.raises(FileNotFoundError):
            store.open_file("missing")
        with pytest.raises(BackendError):
            store.path("../outside")
        assert store.identity("missing") is None
        assert store.identity("d/a") not in (None, store.identity("d/c"))

    def test_a_range_in_the_clients_memory_is_that_of_the_blob(self, store: Store) -> None:
        """For a store that `SupportsBuffers`."""
        if not isinstance(store, SupportsBuffers):
            pytest.skip("it does not claim buffers")
        store.put("d/a", [bytes(range(100))])
        assert bytes(store.get_buffer("d/a", 10, 90)) == bytes(range(10, 90))
        assert bytes(store.get_buffer("d/a", 10, 10)) == b""
        assert store.get_buffer("d/a", 0, 4).readonly
        with pytest.raises(FileNotFoundError):
            store.get_buffer("missing", 0, 4)
        with pytest.raises(BackendError):
            store.get_buffer("../outside", 0, 4)

    def test_a_blob_can_be_written_piece_by_piece(self, store: Store) -> None:
        """For a store that `SupportsAppend`: seen once it is published, whole."""
        if not isinstance(store, SupportsAppend):
            pytest.skip("it does not claim to append")
        blob = store.begin("d/a", 4)
        assert blob.write([b"body", memoryview(b"tail")]) == 8
        assert list(store.list()) == []
        blob.publish(b"head")
        blob.abandon()
        assert store.get("d/a") == b"headbodytail"
        store.begin("d/b", 0).abandon()
        assert [entry.name for entry in store.list()] == ["d/a"]

    def test_a_folder_is_published_at_once(self, store: Store) -> None:
        """For a store that `SupportsFolders`."""
        if not isinstance(store, SupportsFolders):
            pytest.skip("it does not claim folders")
        rows = struct.pack("=14q", *(0, 4, 0, 4, 4, 8, -1), *(0, 0, 0, 0, 0, 0, 0))
        folder = Folder(["a"], ["a/one", "two"], rows, b"headtail", b"body")
        begun = store.begin_folder("step_0")
        assert begun is not None
        begun.make(folder)
        begun.make(folder._replace(folders=["b"], names=["b/one", "b/two"]))
        begun.link([("a/one", "three")])
        assert list(store.list()) == []
        begun.publish()
        begun.abandon()
        assert [store.get(f"step_0/{name}") for name in ("a/one", "two", "b/one", "three")] == [
            b"headbodytail"
        ] * 4
        assert store.begin_folder("step_0") is None
        store.put("step_1/two", [b"mine"])
        assert store.begin_folder("step_1") is None
        failing = store.begin_folder("step_2")
        assert failing is not None
        with pytest.raises(BackendError):
            failing.make(folder._replace(names=["nowhere/one", "two"]))
        with pytest.raises(BackendError):
            failing.link([("nowhere", "three")])
        failing.abandon()
        of_step = [f"step_0/{name}" for name in ("a/one", "b/one", "b/two", "three", "two")]
        assert sorted(entry.name for entry in store.list()) == [*of_step, "step_1/two"]
        assert store.get("step_1/two") == b"mine"

    def test_its_root_is_made_and_removed(self, store: Store) -> None:
        """For a store that `SupportsPrepare`, `SupportsUsage` or `SupportsRemoval`."""
        claimed = (SupportsPrepare, SupportsUsage, SupportsRemoval)
        if not isinstance(store, claimed):
            pytest.skip("it claims nothing of its root")
        if isinstance(store, SupportsPrepare):
            store.prepare()
            store.prepare()
        store.put("a", [b"1234"])
        store.copy("a", "b")
        if isinstance(store, SupportsUsage):
            assert store.usage() in (4, 8)
        if isinstance(store, SupportsRemoval):
            store.remove_root()
            assert list(store.list()) == []

    def test_a_small_blob_is_replaced_where_it_lies(self, store: Store) -> None:
        """For a store that `SupportsOverwrite`."""
        if not isinstance(store, SupportsOverwrite):
            pytest.skip("it does not claim to overwrite")
        store.put("run.json", [b"a longer text"])
        assert store.overwrite("run.json", "short")
        assert store.get("run.json") == b"short"
        assert not store.overwrite("missing", "text")

    def test_nothing_waits_when_all_is_there(self, store: Store) -> None:
        """For a store that `SupportsWaiting`."""
        if not isinstance(store, SupportsWaiting):
            pytest.skip("it never waits")
        store.put("a", [b"x"])
        assert store.waiting is None

    def test_several_threads_may_use_it_at_once(self, store: Store) -> None:
        """No blob is lost or mixed up."""

        def work(n: int) -> None:
            for i in range(5):
                store.put(f"{n}/{i}", [bytes([n, i])])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {e.name: store.get(e.name) for e in store.list()} == {
            f"{n}/{i}": bytes([n, i]) for n in range(4) for i in range(5)
        }
