"""How the work is done: in a stream, in other processes, on a cluster, from URLs, and by hashes alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.analysis.emitting import emitted
from tests.servers import Server
from tlcore.__main__ import main
from tlcore.analysis.measure import CHUNK
from tlcore.reader import tensor_stream
from tlcore.reader.stored import Stored

X = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
VALUES = {
    "large": X,
    "half": X[:20].bfloat16(),
    "double": X[:5].double(),
    "whole": torch.arange(12),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
}
CHANGED = {**VALUES, "large": X + 1e-3, "half": VALUES["half"] * 2, "scalar": torch.tensor(3.5)}


@pytest.fixture(params=["pt", "safetensors"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that tensors are read from."""
    seen: list[str] = []

    def spied(stored: Stored, record: Any) -> Any:
        seen.append(record["name"])
        return original(stored, record)

    def spied_together(stored: Stored, records: Any) -> Any:
        seen.extend(record["name"] for record in records)
        return together(stored, records)

    original, together = tensor_stream.open_stream, tensor_stream.open_together
    monkeypatch.setattr("tlcore.reader.step.open_stream", spied)
    monkeypatch.setattr("tlcore.analysis.work.open_together", spied_together)
    return seen


def test_a_tensor_is_measured_a_piece_at_a_time(tmp_path: Path, backend: str) -> None:
    assert X.numel() > 2 * CHUNK
    a, b = (emitted(str(tmp_path), values, backend=backend) for values in (VALUES, CHANGED))
    found = {str(result.path[0]): result for result in tlcore.compare(a, b).results}
    assert {key for key, result in found.items() if not result.agrees} == {"large", "half", "scalar"}
    measures = found["large"].measures
    assert measures is not None
    distance = (VALUES["large"].double() - CHANGED["large"].double()).abs()
    assert measures.max_abs == pytest.approx(float(distance.max()), rel=1e-5)
    assert measures.mean_abs == pytest.approx(float(distance.mean()), rel=1e-5)
    assert measures.rel_l2 == pytest.approx(
        float(distance.norm() / CHANGED["large"].double().norm()), rel=1e-5
    )


def test_backends_and_places_mix(tmp_path: Path) -> None:
    places = ["memory://mixed-compare", str(tmp_path)]
    urls = [emitted(place, VALUES, backend=name) for place in places for name in ("pt", "safetensors")]
    for url in urls[1:]:
        for deep in (False, True):
            found = tlcore.compare(urls[0], url, deep=deep)
            assert found.equal and found.counts["bitwise"] == len(VALUES)
    changed = emitted("memory://mixed-compare", CHANGED, backend="safetensors")
    assert tlcore.compare(urls[3], changed).counts["different"] == 3


def test_equal_hashes_are_not_read_unless_asked_for(tmp_path: Path, backend: str, reads: list[str]) -> None:
    a, b = (emitted(str(tmp_path), VALUES, backend=backend) for _ in range(2))
    assert tlcore.compare(a, b).equal
    assert reads == []
    assert tlcore.compare(a, b, deep=True).equal
    assert len(reads) == 2 * len(VALUES)


@pytest.mark.parametrize(
    ("written", "pattern", "unreadable", "said"),
    [
        ("pt", "*large*.pt", 1, "bytes, step.json says"),
        ({"name": "safetensors", "layout": 1}, "*.safetensors", len(VALUES), "bytes, step.json says"),
        # Of a segment that was cut off, what is left is compared by its bytes.
        ("safetensors", "*.safetensors", 1, "ends too early"),
    ],
)
def test_hashes_settle_nothing_where_a_file_is_not_as_stated(
    tmp_path: Path, written: Any, pattern: str, unreadable: int, said: str, reads: list[str]
) -> None:
    a, b = (emitted(str(tmp_path), VALUES, backend=written) for _ in range(2))
    (file,) = Path(b).rglob(pattern)
    file.write_bytes(file.read_bytes()[:-50])
    found = tlcore.compare(a, b)
    assert not found.equal
    assert found.counts["unreadable"] == unreadable
    assert said in str(next(r.reason for r in found.results if not r.agrees))
    assert len(reads) == 2 * len(VALUES) or unreadable != len(VALUES)
    assert main(["compare", b, a]) == 1


def test_a_pair_of_contents_is_compared_once(tmp_path: Path, reads: list[str]) -> None:
    same = {"one": X, "two": X.clone()}
    a = emitted(str(tmp_path), same)
    b = emitted(str(tmp_path), {key: value + 1 for key, value in same.items()})
    one, two = tlcore.compare(a, b).results
    # Once to measure them, and once for the details of what differs.
    assert len(reads) == 2 + 2
    assert one.measures == two.measures and one.path != two.path
    assert len(tlcore.compare(a, b, deep=True).results) == 2
    assert len(reads) == 4 + 6


def test_files_of_another_writer_are_loaded_by_the_library(tmp_path: Path) -> None:
    a, b = (emitted(str(tmp_path), {"x": X}) for _ in range(2))
    (file,) = Path(b).rglob("*.pt")
    # To a path: the archive has another name inside, so the payload lies elsewhere than in ours.
    torch.save(X, file)
    record = Path(b) / "step_0" / "step.json"
    document = json.loads(record.read_text())
    document["records"][0]["file_bytes"] = file.stat().st_size
    record.write_text(json.dumps(document))
    assert tlcore.compare(a, b, deep=True).equal


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """The address of a Dask scheduler with one worker, each a process of its own on this machine."""
    place = tmp_path / "scheduler.json"
    common = ["--no-dashboard", "--scheduler-file", str(place)]
    commands = [
        ["dask_scheduler", "--host", "127.0.0.1", "--port", "0", *common],
        ["dask_worker", "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", *common],
    ]
    started = []
    try:
        for module, *options in commands:
            command = [sys.executable, "-m", f"distributed.cli.{module}", *options]
            log = (tmp_path / f"{module}.log").open("w")
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
            log.close()
            _wait_for(place)
        yield str(json.loads(place.read_text())["address"])
    finally:
        for process in reversed(started):
            # They hold nothing, and a graceful end waits for connections.
            process.kill()
        for process in reversed(started):
            process.wait(30)


def _wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists() and file.read_text():
            return
        time.sleep(0.1)
    raise TimeoutError(f"{file} did not appear")


@pytest.mark.slow
def test_a_dask_cluster_does_the_same_work(
    tmp_path: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = emitted(str(tmp_path / "a"), VALUES), emitted(str(tmp_path / "b"), CHANGED, backend="safetensors")
    assert main(["compare", a, b, "--deep", "--format", "json"]) == 1
    here = json.loads(capsys.readouterr().out)
    assert main(["compare", a, b, "--deep", "--format", "json", "--dask", scheduler]) == 1
    assert json.loads(capsys.readouterr().out) == here
    assert here["counts"]["different"] == 3
    assert "compare_pairs" in _tasks_seen(scheduler)


def _tasks_seen(address: str) -> str:
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        return str(client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes)))


@pytest.mark.slow
@pytest.mark.parametrize("server", ["seaweedfs"], indirect=True)
def test_urls_take_storage_options(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = {"name": "fsspec", "format": "safetensors", "storage_options": server.options}
    remote = emitted(f"{server.url}/compared", CHANGED, backend=backend)
    local = emitted(str(tmp_path), VALUES)
    options = ["--storage-options", json.dumps(server.options)]
    assert main(["compare", remote, remote, *options]) == 0
    assert main(["compare", local, remote, *options, "--format", "json"]) == 1
    mixed = capsys.readouterr().out
    assert json.loads(mixed[mixed.index("{") :])["counts"]["different"] == 3
    assert main(["compare", local, remote, "--storage-options", "{}", "--storage-options-b", options[1]]) == 1
    capsys.readouterr()
    assert main(["stats", remote, *options]) == 0
    assert capsys.readouterr().out.startswith("no NaN and no Inf")
    assert main(["compare", local, remote, "--storage-options-b", '{"secret": 1']) == 2
    said = capsys.readouterr().err
    assert "--storage-options-b" in said and "secret" not in said


def test_an_unknown_scheduler_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    run = emitted(str(tmp_path), VALUES)
    assert main(["compare", run, run, "--dask", "nonsense://x"]) == 2
    assert "no Dask scheduler at 'nonsense://x'" in capsys.readouterr().err
