"""Exports behind URLs: the same files as in a directory, and nothing that is only half there looks whole."""

from __future__ import annotations

import itertools
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.reader.dataset.served import NAMES, Served
from tests.servers import Server
from tlcore.__main__ import main
from tlcore.errors import BackendError, ReadError
from tlcore.reader import Run
from tlcore.runs.export.export import ABOUT, FORMATS, export
from tlcore.runs.export.target import UrlTarget, new_target

pytest.importorskip("pyarrow")

PLACE = "memory://exports/out"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Served(requests=20).run(tmp_path / "runs", "safetensors")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many windows and files, and no objects of another test."""
    for name in ("arrow.FILE_BYTES", "parquet._FILE_BYTES", "npy._PART_BYTES"):
        monkeypatch.setattr(f"tlcore.runs.export.{name}", 1000)
    monkeypatch.setattr("tlcore.runs.export.export.WINDOW_BYTES", 2000)
    monkeypatch.setattr("tlcore.runs.export.export.OF_REQUESTS", 500)
    _clear()
    yield
    _clear()


def _clear() -> None:
    memory = fsspec.filesystem("memory")
    if memory.exists("/exports"):
        memory.rm("/exports", recursive=True)


def files_at(url: str, **options: object) -> dict[str, bytes]:
    """The bytes of each file below a path or URL, by its name there."""
    filesystem, root = fsspec.url_to_fs(url, **options)
    filesystem.invalidate_cache()
    found = filesystem.find(root) if filesystem.exists(root) else []
    return {name.removeprefix(f"{root}/"): filesystem.cat_file(name) for name in found}


@pytest.mark.parametrize("format", FORMATS)
def test_the_files_behind_a_url_are_those_of_a_directory(run: Run, format: str, tmp_path: Path) -> None:
    names = NAMES[:1] if format == "requests" else NAMES
    here = export(run, tmp_path / "out", format, names)
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        # Other tools leave out what begins with a dot.
        assert all(name.startswith(".unfinished-") for name in files_at(PLACE))

    assert export(run, PLACE, format, names, on_item=tell) == here
    assert told[-1] == (here.items, here.items)
    found = files_at(PLACE)
    assert found == files_at(str(tmp_path / "out")) and ABOUT in found
    assert len(found) > 4


def test_the_documents_that_open_a_set_come_last(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    memory = fsspec.filesystem("memory")
    for name in ("cp_file", "pipe_file"):
        plain = getattr(type(memory), name)

        def call(
            self: object, *given: object, plain: object = plain, name: str = name, **more: object
        ) -> None:
            seen.append(str(given[1 if name == "cp_file" else 0]))
            plain(self, *given, **more)  # type: ignore[operator]

        monkeypatch.setattr(type(memory), name, call)
    export(run, PLACE, "requests", NAMES[:1])
    placed = [name.rpartition("/out/")[2] for name in seen if ".unfinished-" not in name]
    assert placed[-3:] == ["dataset_info.json", "state.json", ABOUT]
    assert all(name.startswith(("hidden_states/", "data-")) for name in placed[:-3])


@pytest.mark.parametrize("where", [PLACE, "directory"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_fails_half_way_leaves_nothing(run: Run, format: str, where: str, tmp_path: Path) -> None:
    target = where if where == PLACE else str(tmp_path / "outs" / "out")
    names = NAMES[:1] if format == "requests" else NAMES

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, target, format, names, on_item=fail)
    assert not files_at(target if where == PLACE else str(tmp_path / "outs"))
    # The place can be used again.
    export(run, target, format, names)


def test_damage_of_the_run_is_told_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    for file in (Path(run.url) / "segments").iterdir():
        if file.suffix == ".safetensors":
            file.write_bytes(file.read_bytes()[:200])
    for target in (PLACE, str(tmp_path / "outs" / "out")):
        with pytest.raises(ReadError, match="ends too early"):
            export(run, target, "requests", NAMES[:1])
    assert not files_at(PLACE) and not files_at(str(tmp_path / "outs"))


def test_a_place_where_something_is_is_refused(run: Run) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/exports/out/file", b"mine")
    with pytest.raises(ReadError, match="memory://exports/out: is there already; export into a new place"):
        export(run, PLACE, "hf", NAMES)
    assert files_at(PLACE) == {"file": b"mine"}
    memory.mv("/exports/out/file", "/exports/out/.unfinished-0123456789ab/part")
    with pytest.raises(ReadError, match=r"an export that was not finished is there \(.unfinished-0123"):
        export(run, PLACE, "hf", NAMES)
    with pytest.raises(BackendError, match="nonsense"):
        export(run, "nonsense://out", "hf", NAMES)


def _before_copies(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something before that many-th copy to a place."""
    memory = type(fsspec.filesystem("memory"))
    copy, calls = memory.cp_file, itertools.count(1)

    def call(self: Any, *given: Any, **more: Any) -> None:
        if next(calls) == number:
            act()
        copy(self, *given, **more)

    monkeypatch.setattr(memory, "cp_file", call)


def test_what_others_put_into_the_place_meanwhile_is_theirs(run: Run) -> None:
    memory = fsspec.filesystem("memory")

    def put(done: int, total: int) -> None:
        memory.pipe_file("/exports/out/part-00000.parquet", b"theirs")
        memory.pipe_file("/exports/out/.unfinished-0123456789ab/part", b"theirs")

    with pytest.raises(
        ReadError, match=r"memory://exports/out: part-00000.parquet has come there from elsewhe"
    ):
        export(run, PLACE, "parquet", NAMES, on_item=put)
    left = {"part-00000.parquet": b"theirs", ".unfinished-0123456789ab/part": b"theirs"}
    assert files_at(PLACE) == left


def test_an_error_among_the_copies_takes_back_what_was_placed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        fsspec.filesystem("memory").pipe_file("/exports/out/theirs", b"theirs")
        raise PermissionError("no copies here")

    _before_copies(monkeypatch, 3, fail)
    with pytest.raises(BackendError, match="no copies here"):
        export(run, PLACE, "parquet", NAMES)
    assert files_at(PLACE) == {"theirs": b"theirs"}


@pytest.mark.parametrize("fails", [False, True])
def test_what_cannot_be_removed_is_told(
    run: Run, fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Any, *given: Any, **more: Any) -> None:
        raise PermissionError("may not remove")

    def fail() -> None:
        raise PermissionError("no copies here")

    if fails:
        _before_copies(monkeypatch, 2, fail)
    with monkeypatch.context() as patch, ExitStack() as stack:
        patch.setattr(type(fsspec.filesystem("memory")), "rm_file", refuse)
        patch.setattr(type(fsspec.filesystem("memory")), "rm", refuse)
        if fails:
            stack.enter_context(pytest.raises(BackendError, match="no copies here"))
        export(run, PLACE, "parquet", NAMES)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "tlcore")
    unfinished = next(name.partition("/")[0] for name in files_at(PLACE) if name.startswith(".unfinished-"))
    then = ", part-00000.parquet, part-00001.parquet, " if fails else ", which could not be ("
    assert f"memory://exports/out: remove by hand {unfinished}/{then}" in said


def test_what_is_put_after_a_directory_was_removed_does_not_bring_it_back(tmp_path: Path) -> None:
    with new_target(tmp_path / "out", None) as place:
        pass
    for name in ("part", "data/part"):
        with pytest.raises(BackendError, match="is not there; all workers of a cluster must see the target"):
            place.put(name, [b"late"])
        with pytest.raises(BackendError, match="is not there"), place.file(name):
            pass
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


def test_threads_have_ended_when_an_export_has_failed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put, ended = UrlTarget.put, threading.Event()

    def slow(self: UrlTarget, name: str, parts: Any) -> None:
        if name.endswith("hs_1.safetensors"):
            time.sleep(0.5)
            ended.set()
        put(self, name, parts)

    def fail(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UrlTarget, "put", slow)
    monkeypatch.setattr("tlcore.runs.export.requests._TABLE_ROWS", 1)
    monkeypatch.setattr("tlcore.runs.export.requests._batch", fail)
    with pytest.raises(KeyboardInterrupt):
        export(run, PLACE, "requests", NAMES[:1])
    assert ended.is_set() and not files_at(PLACE)


def test_what_s3_would_not_copy_in_the_end_is_refused_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = UrlTarget("s3://bucket/out", None)
    place.check_size("small.npy", 4 << 30)
    with pytest.raises(
        ReadError, match=r"s3://bucket/out: big.npy would have 5.0 GiB, and S3 copies at most 5 GiB"
    ):
        place.check_size("big.npy", 5 << 30)
    UrlTarget("gs://bucket/out", None).check_size("big.npy", 5 << 30)
    monkeypatch.setattr("tlcore.runs.export.target._S3", ("memory",))
    monkeypatch.setattr("tlcore.runs.export.target._HEAD_BYTES", 0)
    for format, most in (("npy", 1000), ("requests", 100)):
        monkeypatch.setattr("tlcore.runs.export.target._MOST_COPIED", most)
        with pytest.raises(ReadError, match="export into a directory, or as parquet"):
            export(run, PLACE, format, NAMES[:1], on_item=lambda done, total: pytest.fail("work began"))
    assert not files_at(PLACE)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_temporary_directory_is_told(
    run: Run, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(BackendError) as caught:
            export(run, PLACE, format, NAMES[:1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"{tmp_path}: ") and "File too large" in str(caught.value)
    assert "the environment variable TMPDIR names another directory" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["seaweedfs"], indirect=True)
@pytest.mark.parametrize("package", ["obstore", "s3fs"])
def test_an_export_goes_to_a_bucket(
    run: Run, server: Server, package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A field that obstore has no word for is left to s3fs.
    options = {**server.options, **({"anon": False} if package == "s3fs" else {})}
    url = f"{server.url}/exports-{package}"
    for format in ("requests", "parquet", "npy"):
        words = ["--format", format, "--tensor", NAMES[0]]
        assert main(["export", run.url, str(tmp_path / package / format), *words]) == 0
        given = ["--target-storage-options", json.dumps(options)]
        assert main(["export", run.url, f"{url}/{format}", *words, *given]) == 0
        assert f"{url}/{format}: " in capsys.readouterr().out
        there = files_at(f"{url}/{format}", **server.options)
        assert there == files_at(str(tmp_path / package / format))
    assert server.wrong_options is not None
    wrong = ["--target-storage-options", json.dumps(server.wrong_options)]
    assert main(["export", run.url, f"{url}/wrong", *words, *wrong]) == 2
    assert "credentials" in capsys.readouterr().err
