"""`LocalStore` on a real directory: atomic, private, confined to its root."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import join
from tlcore.errors import BackendError
from tlcore.hotpath.copying import write_all
from tlcore.protocols import Entry
from tlcore_backends.storage.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out" / "run")


def mode(path: Path) -> int:
    """The permission bits of a file or directory."""
    return stat.S_IMODE(path.lstat().st_mode)


def test_put_get_list_delete(store: LocalStore) -> None:
    assert store.put("step_0/a/t.pt", [b"head", memoryview(b"body"), bytearray(b""), b"tail"]) == 12
    assert store.get("step_0/a/t.pt") == b"headbodytail"
    assert store.get("step_0/a/t.pt", 4, 8) == b"body"
    assert store.get("step_0/a/t.pt", 8) == b"tail"
    store.put("run.json", [b"{}"])
    assert sorted(store.list()) == [Entry("run.json", 2), Entry("step_0/a/t.pt", 12)]
    assert list(store.list("step_0/")) == [Entry("step_0/a/t.pt", 12)]
    assert list(store.list("ste")) == [Entry("step_0/a/t.pt", 12)]
    assert list(store.list("step_1/")) == []
    store.delete("run.json")
    store.delete("run.json")
    with pytest.raises(FileNotFoundError):
        store.get("run.json")


def test_put_replaces_a_blob_but_not_its_other_links(store: LocalStore) -> None:
    store.put("a", [b"1"])
    store.copy("a", "b")
    store.put("a", [b"2"])
    assert (store.get("a"), store.get("b")) == (b"2", b"1")


def test_parts_of_any_number_and_item_size_are_written(store: LocalStore) -> None:
    wide = memoryview(bytearray(range(200))).cast("I")
    parts = [bytes([n % 256]) * (n % 5) for n in range(5000)]
    assert store.put("many", [*parts, wide]) == sum(map(len, parts)) + 200
    assert store.get("many") == b"".join(parts) + bytes(range(200))


def test_a_short_write_is_continued(store: LocalStore) -> None:
    store.prepare()
    os.mkfifo(store.root / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((store.root / "pipe").read_bytes()))
    reader.start()
    handle = os.open(store.root / "pipe", os.O_WRONLY)
    big = os.urandom(1 << 20)
    write_all(handle, [big, b"end"])
    os.close(handle)
    join(reader)
    assert read == [big + b"end"]


def test_files_and_directories_are_private(store: LocalStore) -> None:
    store.put("step_0/a/t.pt", [b"x"])
    assert mode(store.root / "step_0/a/t.pt") == 0o600
    for directory in (store.root.parent, store.root, store.root / "step_0", store.root / "step_0/a"):
        assert mode(directory) == 0o700


def test_copy_is_a_hard_link_and_replaces(store: LocalStore) -> None:
    store.put("a", [b"same"])
    store.copy("a", "x/b")
    assert os.path.samefile(store.root / "a", store.root / "x/b")
    store.put("c", [b"old"])
    store.copy("a", "c")
    store.copy("a", "c")
    assert store.get("c") == b"same"
    assert [entry for entry in os.listdir(store.root) if entry.endswith(".tmp")] == []
    with pytest.raises(FileNotFoundError):
        store.copy("missing", "d")


def test_copy_falls_back_to_bytes_where_links_are_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    store.put("a", [b"same"])
    monkeypatch.setattr(os, "link", no_links)
    store.copy("a", "b")
    assert store.get("b") == b"same"
    assert not os.path.samefile(store.root / "a", store.root / "b")


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a//b", "./a", "a/.", "a\0b", "a.tmp"])
def test_names_that_could_leave_the_root_are_refused(store: LocalStore, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put(name, [b""]),
        lambda: store.get(name),
        lambda: store.copy(name, "b"),
        lambda: store.delete(name),
    ]
    for call in calls:
        with pytest.raises(BackendError, match="not a valid name"):
            call()


def test_a_symbolic_link_as_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match=f"{tmp_path}/run: a symbolic link or a file is in the way"):
        LocalStore(tmp_path / "run").put("a", [b"x"])
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_symbolic_link_inside_is_not_written_through(store: LocalStore, tmp_path: Path) -> None:
    store.prepare()
    (store.root / "step_0").symlink_to(tmp_path)
    with pytest.raises(BackendError, match="symbolic link"):
        store.put("step_0/t.pt", [b"x"])
    assert not (tmp_path / "t.pt").exists()


def test_a_symbolic_link_that_leads_out_is_not_read(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", [b"x"])
    (tmp_path / "secret").write_text("s")
    (store.root / "leak").symlink_to(tmp_path / "secret")
    with pytest.raises(BackendError, match="leads out of"):
        store.get("leak")
    assert [entry.name for entry in store.list()] == ["a"]


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(BackendError, match="other users can write"):
        LocalStore(tmp_path / "run").put("a", [b"x"])


def test_a_parent_such_as_tmp_is_fine(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    LocalStore(tmp_path / "run").put("a", [b"x"])
    assert mode(tmp_path / "run") == 0o700


def test_what_the_system_refuses_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=f"cannot make the run directory {tmp_path}/file/run"):
        LocalStore(tmp_path / "file" / "run").put("a", [b"x"])
    store = LocalStore(tmp_path / "run")
    store.put("directory/a", [b"x"])
    with pytest.raises(BackendError, match=f"cannot write {tmp_path}/run/directory: Is a directory"):
        store.put("directory", [b"x"])
    with pytest.raises(BackendError, match="File name too long"):
        store.put("n" * 300, [b"x"])
    assert list(store.list()) == [Entry("directory/a", 1)]
    assert sorted(os.listdir(store.root)) == ["directory"], "a failed write leaves nothing behind"


def test_fsync_reaches_file_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def record(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", record)
    LocalStore(tmp_path / "plain").put("a", [b"x"])
    assert synced == []
    store = LocalStore(tmp_path / "run", fsync=True)
    store.put("d/a", [b"x"])
    store.copy("d/a", "d/b")
    assert str(tmp_path) in synced
    assert str(store.root) in synced
    assert synced[-1] == str(store.root / "d")
    assert any(path.endswith(".tmp") for path in synced)


def test_threads_can_write_at_once(store: LocalStore) -> None:
    def write(n: int) -> None:
        for i in range(40):
            store.put(f"step_{i % 3}/{n}/{i}", [bytes([n]) * 10])
            store.put("contested", [bytes([n]) * 1000])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    join(threads)
    assert len(list(store.list("step_"))) == 160
    assert len(set(store.get("contested"))) == 1
    assert len(store.get("contested")) == 1000


def test_links_of_one_file_have_one_identity(store: LocalStore) -> None:
    store.put("a/t", [b"1"])
    store.copy("a/t", "b/t")
    store.put("c/t", [b"1"])
    assert store.identity("a/t") == store.identity("b/t") != store.identity("c/t")
    assert store.identity("d/t") is None


def test_a_link_that_leads_out_is_refused_in_a_known_place(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    store.put("a/t", [b"1"])
    assert store.get("a/t") == b"1"
    (store.root / "a" / "u").symlink_to(tmp_path / "secret")
    (store.root / "b").symlink_to(tmp_path)
    for name in ("a/u", "b/secret"):
        with pytest.raises(BackendError, match="leads out"):
            store.get(name)


def test_more_directories_than_are_remembered_from_several_threads(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcore_backends.storage.local._MOST_KNOWN_DIRECTORIES", 3)

    def put(thread: int) -> None:
        for index in range(50):
            store.put(f"{index}/{thread}/t", [b"1"])

    threads = [threading.Thread(target=put, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(list(store.list())) == 200
