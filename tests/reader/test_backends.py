"""The reader on every format and place: the same run, lazily, with bounded trust in what is stored."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

import tlcore
from tests.servers import Server
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.errors import ReadError, VerifyError
from tlcore.reader import Run
from tlcore.registry import open_store
from tlcore.testing import RunWriter, every_dtype, make_record, make_run, make_summary
from tlcore_backends.safetensors.sink import SafetensorsSink
from tlcore_backends.storage.remote import FsspecStore

_fresh = itertools.count()
NAME = "step_0/0/outputs_cpu"


def capture(output_dir: str, backend: Any) -> str:
    """The URL of a run with two steps of a small model, in which outputs are the next module's inputs.

    Each step has the request rows that a vLLM step has.
    """
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    config = load_config(output_dir=output_dir, backend=backend, log_step_ids=[])
    session = Session(config, new_run(config))
    session.attach(model)
    for step in range(2):
        session.begin_step()
        model(torch.randn(3, 4))
        row = {"request_id": f"r{step}", "first_row": 0, "rows": 3, "first_position": step}
        session.end_step(rows=[row])
    session.close()
    return session.url


def content(run: Run) -> dict[str, Any]:
    """All that the reader says of a run, in a form that can be compared."""
    steps = [run.step(number) for number in run.steps]
    return {
        "state": run.state,
        "steps": run.steps,
        "ledger": run.ledger,
        "calls": [step.calls for step in steps],
        "rows": [step.rows for step in steps],
        "tensors": {name: (t.dtype, t.tolist()) for step in steps for name, t in step.items()},
        "structures": [
            (call, step.call(call).module, step.call(call).structure(direction))
            for step in steps
            for call in step.calls
            for direction in ("inputs", "outputs")
        ],
        "outputs": [step.call("2").outputs.tolist() for step in steps],
        "json": run.json("step_1/2/inputs.json"),
        "sound": run.verify(),
    }


@pytest.fixture(scope="module")
def reference_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return capture(str(tmp_path_factory.mktemp("reference")), "pt")


@pytest.fixture(scope="module")
def reference(reference_url: str) -> dict[str, Any]:
    return content(tlcore.open_run(reference_url))


def tree(url: str) -> dict[str, bytes]:
    """The documented files of a local ``pt`` run's steps; ``step.json`` tells the time, so it differs."""
    files = (path for path in Path(url).rglob("*") if path.is_file() and path.parent != Path(url))
    return {str(p.relative_to(url)): p.read_bytes() for p in files if p.name != "step.json"}


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
@pytest.mark.parametrize("remote", [False, True])
def test_every_backend_reads_the_same(
    reference: dict[str, Any], tmp_path: Path, backend: str, remote: bool
) -> None:
    parent = f"memory://reader-{next(_fresh)}" if remote else str(tmp_path)
    url = capture(parent, backend)
    run = tlcore.open_run(url)
    assert run.url == url
    assert content(run) == reference


@pytest.mark.slow
@pytest.mark.parametrize("storage_format", ["pt", "safetensors"])
def test_object_storage_reads_the_same(
    reference: dict[str, Any],
    reference_url: str,
    server: Server,
    storage_format: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent = f"{server.url}/reader-{next(_fresh)}"
    backend = {"name": "fsspec", "url": parent, "format": storage_format, "storage_options": server.options}
    url = capture(parent, backend)
    assert content(tlcore.open_run(url, server.options)) == reference
    options = json.dumps(server.options)
    assert main(["ls", parent, "--storage-options", options, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert (listed["state"], listed["steps"], listed["tensors"]) == ("complete", 2, 16)
    assert main(["verify", url, "--storage-options", options]) == 0
    shown = fsspec.filesystem("tlcore", run=url, storage_options=server.options)
    documented = tree(reference_url)
    assert set(documented) == {
        name for name in shown.find("") if "/" in name and not name.endswith("step.json")
    }
    assert {name: shown.cat_file(name) for name in documented} == documented
    with shown.open(f"{NAME}.pt") as file:
        loaded = torch.load(file, weights_only=True)
    assert loaded.tolist() == reference["tensors"][NAME][1]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int | None]]:
    """The reads that reach the place, in order."""
    seen: list[tuple[str, int, int | None]] = []
    get: Callable[..., bytes] = FsspecStore.get

    def counted(store: FsspecStore, name: str, start: int = 0, end: int | None = None) -> bytes:
        seen.append((name, start, end))
        return get(store, name, start, end)

    monkeypatch.setattr(FsspecStore, "get", counted)
    return seen


def test_reading_is_lazy(reads: list[tuple[str, int, int | None]]) -> None:
    url = capture(f"memory://reader-{next(_fresh)}", {"name": "safetensors", "layout": 1})
    run = tlcore.open_run(url)
    assert [name for name, *_ in reads] == ["run.json"]
    step = run.step(0)
    record = step.record(NAME)
    step.call("0").structure("inputs")
    assert [name for name, *_ in reads[1:]] == ["step_0/step.json"]
    run.tensor(NAME)
    assert reads[2:] == [(record["shard"], *record["offsets"])]


def test_every_dtype_comes_back_from_a_shard(tmp_path: Path) -> None:
    tensors = {f"step_0/m/{name}_cpu": tensor for name, tensor in every_dtype().items()}
    tensors["step_0/m/empty_cpu"] = torch.empty(0, 3)
    records = [make_record(name, tensor) for name, tensor in tensors.items()]
    sink = RunWriter(SafetensorsSink(), run=make_run(tmp_path / "run"), backend="safetensors")
    sink.write(records)
    sink.commit_step(make_summary(0, records))
    sink.close()
    step = tlcore.open_run(tmp_path / "run").step(0)
    for name, tensor in tensors.items():
        assert (step[name].dtype, step[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(step[name].reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0, 1 << 60]}, "are not those of"),
        ({"offsets": [-48, 0]}, "damaged record, offsets"),
        ({"offsets": [0, True]}, "damaged record, offsets"),
        ({"offsets": [48, 0]}, "are not those of"),
        ({"shape": [3, 5]}, "are not those of"),
        ({"dtype": "load"}, "damaged record, or of a backend"),
        ({"shard": "../../secret"}, "not a valid name"),
        ({"shard": None}, "damaged record, or of a backend"),
        ({"offsets": [1 << 40, (1 << 40) + 48]}, "ends too early"),
    ],
)
def test_nonsense_in_a_record_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = Path(capture(str(tmp_path), {"name": "safetensors", "layout": 1}), "step_0/step.json")
    document = json.loads(path.read_text())
    record = next(record for record in document["records"] if record["name"] == NAME)
    record.update(change)
    path.write_text(json.dumps(document))
    run = tlcore.open_run(path.parents[1])
    with pytest.raises(ReadError, match=message):
        run.tensor(NAME)
    with pytest.raises(VerifyError, match=message):
        run.verify()


def test_ls_show_and_verify_take_urls(capsys: pytest.CaptureFixture[str]) -> None:
    parent = f"memory://reader-{next(_fresh)}"
    urls = [capture(parent, "safetensors"), capture(parent, "pt")]
    assert main(["ls", parent]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [[url.rpartition("/")[2], "complete"] for url in urls]
    assert main(["ls", urls[0], "--storage-options", "{}"]) == 0
    assert "8 captured, 8 stored" in capsys.readouterr().out
    assert main(["show", urls[0], NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [3, 4]
    assert main(["verify", urls[0]]) == 0
    assert capsys.readouterr().out.endswith("complete  16 tensors sound\n")
    with pytest.raises(ReadError, match=r"holds runs \(2\)"):
        tlcore.open_run(parent)


def test_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{capture(str(tmp_path), 'safetensors')}"
    store = open_store(url)
    record = tlcore.open_run(url).step(0).record(NAME)
    data = bytearray(store.get(record["shard"]))
    data[record["offsets"][0]] ^= 1
    store.put(record["shard"], [data])
    assert main(["verify", url]) == 1
    assert NAME in capsys.readouterr().out
    store.put(record["shard"], [data[:-1]])
    assert main(["verify", url, "--json"]) == 1
    assert any("of another size" in line for line in json.loads(capsys.readouterr().out)["bad"])
    assert main(["verify", str(tmp_path / "missing")]) == 2


def test_bad_storage_options_are_not_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[1]", '{"secret": "hunter2"'):
        assert main(["ls", "memory://x", "--storage-options", text]) == 2
        error = capsys.readouterr().err
        assert "--storage-options" in error
        assert "hunter2" not in error
