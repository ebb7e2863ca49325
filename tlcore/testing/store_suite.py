"""The conformance suite for stores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..errors import BackendError
from ..protocols import Entry, Store


class StoreConformance:
    """What every `Store` must do. Subclass it as ``Test...`` and override `make_store`."""

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
