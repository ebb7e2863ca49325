"""Exports by the workers of a Dask cluster: processes of their own on this machine."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reader.dataset.served import NAMES, Served
from tests.runs.test_export_places import PLACE, files_at
from tests.waiting import wait_until
from tlcore.__main__ import main
from tlcore.errors import BackendError, ReadError
from tlcore.reader import open_run
from tlcore.runs.export.export import FORMATS, export
from tlcore.runs.export.target import UrlTarget
from tlcore.runs.export.work import Cluster

pytest.importorskip("pyarrow")
distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(host="127.0.0.1", **options) as found:
        yield found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts; what the workers have to know of that goes to them with the job."""
    for name in ("arrow.FILE_BYTES", "parquet._FILE_BYTES", "npy._PART_BYTES"):
        monkeypatch.setattr(f"tlcore.runs.export.{name}", 1000)
    monkeypatch.setattr("tlcore.runs.export.export.WINDOW_BYTES", 2000)
    monkeypatch.setattr("tlcore.runs.export.export.OF_REQUESTS", 500)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_cluster_writes_the_same_files(
    cluster: Any, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Served(requests=30).run(tmp_path / "runs", backend)
    monkeypatch.chdir(tmp_path)
    # By a name that means something else to the workers.
    run = open_run(os.path.join("runs", os.listdir("runs")[0]))
    with distributed.Client(cluster, set_as_default=False) as client:
        for format in FORMATS:
            names = NAMES[:1] if format == "requests" else NAMES
            here = export(run, tmp_path / "here" / format, format, names)
            told: list[tuple[int, int]] = []
            target = Path("there", format)
            done = export(run, target, format, names, on_item=_Telling(told), client=client)
            assert done == here and told[-1] == (done.items, done.items) and len(told) > 1
            assert [each[0] for each in told] == sorted(each[0] for each in told)
            there = files_at(str(tmp_path / "there" / format))
            assert there == files_at(str(tmp_path / "here" / format))
        seen = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
        assert "counted" in seen


@pytest.mark.slow
def test_what_goes_wrong_in_a_cluster_is_told(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Served(requests=30).run(tmp_path / "runs", "safetensors")
    words = ["export", run.url, "--tensor", NAMES[0], "--dask", cluster.scheduler_address]
    # Each process has a memory of its own.
    assert main([*words, PLACE, "--format", "requests"]) == 2
    assert "all workers of a cluster must see the target under the same name" in capsys.readouterr().err
    assert main([*words, PLACE, "--format", "npy"]) == 2
    assert "npy is one object, which several workers cannot write at a URL" in capsys.readouterr().err
    for file in (Path(run.url) / "segments").iterdir():
        if file.suffix == ".safetensors":
            file.write_bytes(file.read_bytes()[:200])
    target = tmp_path / "outs" / "out"
    assert main([*words, str(target), "--format", "parquet"]) == 2
    assert "ends too early" in capsys.readouterr().err
    assert os.listdir(target.parent) == []
    assert main([*words, str(target), "--format", "hf", "--tensor", "layers_1/output"]) == 2
    assert "did you mean 'layers_1/outputs'" in capsys.readouterr().err


class _Telling:
    """Keeps what it is told."""

    def __init__(self, told: list[tuple[int, int]]) -> None:
        self._told = told

    def __call__(self, done: int, total: int) -> None:
        self._told.append((done, total))


@pytest.fixture
def threads() -> Iterator[Any]:
    """A cluster in this process, where each test has its own."""
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as found:
        yield found


def test_a_cluster_without_workers_is_an_error(threads: Any, tmp_path: Path) -> None:
    run = Served(requests=3).run(tmp_path / "runs", "safetensors")
    threads.scale(0)
    with distributed.Client(threads, set_as_default=False) as client:
        wait_until(lambda: not client.nthreads(), "all workers have left")
        with pytest.raises(BackendError, match=r"the cluster has no workers$"):
            export(run, tmp_path / "out", "parquet", NAMES, client=client)
        assert not (tmp_path / "out").exists()
        with pytest.raises(ReadError, match="there is no format"):
            export(run, tmp_path / "out", "csv", NAMES, client=client)
    with pytest.raises(BackendError, match="--dask: the cluster failed"):
        export(run, tmp_path / "out", "parquet", NAMES, client=client)


def test_workers_that_all_leave_end_an_export(
    threads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcore.runs.export.work._SLICE_S", 0.2)
    run = Served(requests=30).run(tmp_path / "runs", "safetensors")
    with distributed.Client(threads, set_as_default=False) as client:

        def leave(done: int, total: int) -> None:
            threads.scale(0)
            wait_until(lambda: not client.nthreads(), "all workers have left")

        # What was sent to them is lost, and with it each task.
        with pytest.raises(BackendError, match="--dask: the cluster failed"):
            export(run, tmp_path / "outs" / "out", "parquet", NAMES, on_item=leave, client=client)
        # A task that nothing is lost of waits for workers.
        with pytest.raises(BackendError, match="all workers of the cluster have left"):
            Cluster(client, lambda items: None)._result(client.submit(abs, -1))
    assert os.listdir(tmp_path / "outs") == []


@pytest.mark.parametrize("format", ["requests", "parquet"])
def test_what_runs_when_an_export_fails_brings_nothing_back(
    threads: Any, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Served(requests=30).run(tmp_path / "runs", "safetensors")
    put, ended = UrlTarget.put, []

    def slow(self: UrlTarget, name: str, parts: Any) -> None:
        time.sleep(0.3)
        put(self, name, parts)
        ended.append(name)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UrlTarget, "put", slow)
    with distributed.Client(threads, set_as_default=False) as client:
        with pytest.raises(KeyboardInterrupt):
            export(run, PLACE, format, NAMES[:1], on_item=fail, client=client)
        known = len(ended)
        assert not files_at(PLACE)
        time.sleep(1)
        assert not files_at(PLACE) and len(ended) == known


def test_a_task_that_is_waited_for_brings_nothing_back_after_an_interrupt(
    threads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Served(requests=30).run(tmp_path / "runs", "safetensors")
    put, began = UrlTarget.put, threading.Event()

    def slow(self: UrlTarget, name: str, parts: Any) -> None:
        if name.endswith("hs_0.safetensors"):
            began.set()
            time.sleep(0.7)
        put(self, name, parts)

    def interrupted(self: Cluster, future: Any) -> Any:
        assert began.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(UrlTarget, "put", slow)
    monkeypatch.setattr(Cluster, "_result", interrupted)
    with distributed.Client(threads, set_as_default=False) as client:
        with pytest.raises(KeyboardInterrupt):
            export(run, PLACE, "requests", NAMES[:1], client=client)
        assert not files_at(PLACE)
        time.sleep(1)
        assert not files_at(PLACE)


def test_what_the_caller_raises_is_no_error_of_the_cluster(threads: Any, tmp_path: Path) -> None:
    run = Served(requests=3).run(tmp_path / "runs", "safetensors")

    def fail(done: int, total: int) -> None:
        raise ValueError("mine")

    with (
        distributed.Client(threads, set_as_default=False) as client,
        pytest.raises(ValueError, match=r"^mine$"),
    ):
        export(run, tmp_path / "outs" / "out", "parquet", NAMES, on_item=fail, client=client)
    assert os.listdir(tmp_path / "outs") == []


def test_an_error_of_the_work_on_a_worker_is_no_error_of_the_cluster(
    threads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Served(requests=3).run(tmp_path / "runs", "safetensors")

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tlcore.runs.export.parquet.write_parquet", full)
    with (
        distributed.Client(threads, set_as_default=False) as client,
        pytest.raises(BackendError, match=r"a worker of --dask cannot write \(No space left on device\)"),
    ):
        export(run, tmp_path / "out", "parquet", NAMES, client=client)


def test_without_dask_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Served(requests=3).run(tmp_path / "runs", "safetensors")
    words = ["export", run.url, str(tmp_path / "out"), "--format", "parquet", "--tensor", NAMES[0], "--dask"]
    assert main([*words, "nonsense://x"]) == 2
    assert "no Dask scheduler at 'nonsense://x'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main([*words, "tcp://127.0.0.1:8786"]) == 2
    assert "--dask needs distributed: pip install 'tlcore[dask]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
