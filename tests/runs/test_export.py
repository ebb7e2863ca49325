"""Exports, read back by what is installed here: each row against what `run.request` gives."""

from __future__ import annotations

import gc
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tlcore
from tests.ranked import Rows, requests_run
from tests.reader.dataset.served import NAMES, Served
from tlcore.__main__ import main
from tlcore.errors import ReadError, TlcoreError
from tlcore.reader import Run
from tlcore.runs.export import requests
from tlcore.runs.export.export import ABOUT, export
from tlcore.runs.export.job import Memory
from tlcore.runs.export.target import DirectoryTarget
from tlcore_backends.safetensors import segment_files

pytest.importorskip("pyarrow")

LAYER = "layers_0/outputs_cpu"
FORMATS = ["requests", "hf", "arrow", "parquet", "npy"]


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(requests=20)


@pytest.fixture(params=["pt", "safetensors"])
def run(request: pytest.FixtureRequest, served: Served, tmp_path: Path) -> Run:
    return served.run(tmp_path / "runs", request.param, torch.bfloat16)


def test_requests_have_a_file_each_with_their_layers_and_tokens(
    run: Run, served: Served, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    told: list[tuple[int, int]] = []
    twice = "layers_0/outputs + layers_0/inputs_0"
    layers = ["layers_0/outputs", twice, f"{twice} + layers_0/outputs", "layers_0/inputs_0"]
    done = export(run, target, "requests", layers, on_item=lambda *each: told.append(each))
    assert done.items == len(served.ids) and not done.left_out
    assert told == [(number + 1, done.items) for number in range(done.items)]
    rows = _stream(target)
    assert len(rows) == done.items
    for number, row in enumerate(rows):
        request = run.request(row["request_id"])
        found = load_file(target / "hidden_states" / f"hs_{number}.safetensors")
        assert found.keys() == {"hidden_states", "token_ids"} and found["token_ids"].dtype is torch.int64
        assert torch.equal(found["token_ids"], request.token_ids)
        assert row["input_ids"] == request.token_ids.tolist() and row["seq_len"] == len(row["input_ids"])
        prompt = served.prompts[row["request_id"]]
        assert row["loss_mask"] == [int(place >= prompt) for place in range(row["seq_len"])]
        assert found["hidden_states"].dtype is torch.bfloat16
        state = request[LAYER]
        sums = [state, state + state, state + state + state, state]
        assert torch.equal(found["hidden_states"], torch.stack(sums, 1))
    about = json.loads((target / ABOUT).read_text())
    assert [each["name"] for each in about["tensors"]] == layers and about["run"] == run.id
    # What was written is a dump that this package reads, too.
    dump = tlcore.open_run(target)
    assert len(dump.steps) == done.items and dump.is_foreign


def test_memory_that_is_used_again_ends_with_the_export(run: Run, tmp_path: Path) -> None:
    made = pickle.loads(pickle.dumps(Memory()))
    assert len(made.take(8)) == 8 and made.take(4).base is made.take(8).base
    del made

    def there() -> list[Memory]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is Memory]

    # The error of another test of this process may hold one.
    before = there()
    export(run, tmp_path / "out", "requests", NAMES[:1])
    assert len(there()) == len(before)


LAYERS = ["a/outputs", "b/outputs"]


def _layered(directory: Path, backend: Any) -> Run:
    """Requests of two layers that are prefilled together, apart in two steps, and decoded together."""
    ids = [f"r{number}-{number:08x}" for number in range(5)]
    steps: list[Rows] = [[(ids[0], 3, 0), (ids[1], 2, 0)], [(ids[2], 4, 0), (ids[1], 1, 2), (ids[3], 1, 0)]]
    steps += [[(ids[4], 6, 0)], *([(each, 1, 6 + at) for each in ids[::2]] for at in range(3))]
    steps += [[(ids[0], 3, 3), (ids[2], 2, 4)]]
    random = torch.Generator().manual_seed(0)

    def tensors(step: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        count = sum(row["rows"] for row in rows)
        return {name: torch.randn(count, 3, 2, generator=random).bfloat16() for name in ("a", "b")}

    def extra(step: int) -> dict[str, Any]:
        told = [
            {
                "request_id": each,
                "prompt": 1,
                "first_position": first,
                "ids": list(range(first, first + count)),
            }
            for each, count, first in steps[step]
        ]
        return {"tokens": told}

    return requests_run(directory, steps, tensors, backend=backend, extra=extra)


@pytest.mark.parametrize("least", [1, 1 << 30])
def test_rows_are_written_from_where_they_lie_or_read_the_same(
    least: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Layers of segments on this machine's disk; sums, small rows of several and other backends are read."""
    gathered: list[str] = []
    put = DirectoryTarget.put_gathered

    def noted(self: DirectoryTarget, name: str, *args: Any) -> None:
        gathered.append(name)
        put(self, name, *args)

    monkeypatch.setattr(DirectoryTarget, "put_gathered", noted)
    monkeypatch.setattr(requests, "_LEAST_GATHERED", least)
    turned = LAYERS[::-1]
    for backend, tensors, gathers in (
        ("safetensors", turned, least == 1),
        ("safetensors", [*LAYERS, " + ".join(LAYERS)], False),
        ("safetensors", LAYERS[:1], True),
        ("pt", turned, False),
    ):
        place = tmp_path / f"{backend}-{len(tensors)}"
        run = _layered(place / "runs", backend)
        gathered.clear()
        export(run, place / "out", "requests", tensors)
        names = [row["request_id"] for row in _stream(place / "out")]
        assert len(names) == 5 and len(gathered) == gathers * 5
        for number, name in enumerate(names):
            states = load_file(place / "out" / "hidden_states" / f"hs_{number}.safetensors")["hidden_states"]
            request = run.request(name)
            assert states.shape == (len(request["a/outputs_cpu"]), len(tensors), 3, 2)
            for at, terms in enumerate(each.split(" + ") for each in tensors):
                first, *others = [request[f"{term}_cpu"] for term in terms]
                assert torch.equal(states[:, at], sum(others, first))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc")
@pytest.mark.parametrize("most", [4, 256])
def test_however_many_segments_a_run_has_few_of_its_files_are_open(
    most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(requests, "_LEAST_GATHERED", 1)
    monkeypatch.setattr(segment_files, "_MOST_MAPS", most)
    monkeypatch.setattr(segment_files, "_MOST_OPEN", 1)
    run = _layered(tmp_path / "runs", {"name": "safetensors", "commit_s": 0})
    assert len(list(Path(run.url).glob("segments/*.safetensors"))) == 7
    opened: list[int] = []
    put = DirectoryTarget.put_gathered

    def noted(self: DirectoryTarget, *args: Any) -> None:
        handles = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
        opened.append(sum(each.startswith(run.url) for each in handles))
        put(self, *args)

    monkeypatch.setattr(DirectoryTarget, "put_gathered", noted)
    export(run, tmp_path / "out", "requests", LAYERS)
    # A map for each file, however many layers lie in it; or none.
    assert max(opened, default=0) == (8 if most > 7 else 0)
    for number, name in enumerate(row["request_id"] for row in _stream(tmp_path / "out")):
        states = load_file(tmp_path / "out" / f"hidden_states/hs_{number}.safetensors")["hidden_states"]
        for at, layer in enumerate(LAYERS):
            assert torch.equal(states[:, at], run.request(name)[f"{layer}_cpu"])


@pytest.mark.parametrize("left", [0.0, 0.9])
def test_a_run_that_others_cut_off_meanwhile_ends_the_export_and_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: float
) -> None:
    monkeypatch.setattr(requests, "_LEAST_GATHERED", 1)
    run = _layered(tmp_path / "runs", "safetensors")
    sizes = {path: path.stat().st_size for path in Path(run.url).glob("segments/*.safetensors")}
    put = DirectoryTarget.put_gathered

    def cut(self: DirectoryTarget, *args: Any) -> None:
        for path in Path(run.url).glob("segments/*.safetensors"):
            os.truncate(path, int(left * sizes[path]))
        put(self, *args)

    monkeypatch.setattr(DirectoryTarget, "put_gathered", cut)
    with pytest.raises(ReadError, match="was cut off while it was read"):
        export(run, tmp_path / "out", "requests", LAYERS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ReadError):
        export(tlcore.open_run(run.url), tmp_path / "out", "requests", LAYERS)


def _stream(directory: Path) -> list[dict[str, Any]]:
    import pyarrow as pa

    found: list[dict[str, Any]] = []
    for file in json.loads((directory / "state.json").read_text())["_data_files"]:
        with pa.ipc.open_stream(str(directory / file["filename"])) as stream:
            found += stream.read_all().to_pylist()
    return found


def test_a_data_set_of_the_hub_has_a_row_for_each_request(run: Run, served: Served, tmp_path: Path) -> None:
    import pandas as pd

    export(run, tmp_path / "out", "hf", NAMES)
    (file,) = (tmp_path / "out" / "data").iterdir()
    assert file.name == "train-00000-of-00001.parquet"
    frame = pd.read_parquet(file)
    assert set(frame["request_id"]) == set(served.ids)
    for row in frame.to_dict("records"):
        request = run.request(row["request_id"])
        assert row["token_ids"].tolist() == request.token_ids.tolist() and row["first_position"] == 0
        assert torch.equal(_tensor(row[NAMES[0]]), request[LAYER])
        assert torch.equal(_tensor(row[NAMES[1]]), request["layers_1/outputs_cpu"])
    assert "bfloat16, as float32" in (tmp_path / "out" / "README.md").read_text()


def _tensor(cells: Any) -> torch.Tensor:
    """Cells of a table as the tensor that was captured: float32 has every bfloat16."""
    values = torch.from_numpy(
        np.array([np.array([*each]) if each.dtype == object else each for each in cells])
    )
    assert values.dtype is torch.float32
    return values.bfloat16()


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_every_token_is_a_row(run: Run, served: Served, format: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = export(run, target, format, NAMES, rows="response")
    requests, positions, ids, values = _parquet(target) if format == "parquet" else _npy(target)
    count = sum(len(ids) - served.prompts[request] for request, ids in served.ids.items())
    assert done.items == len(requests) == len(set(zip(requests, positions, strict=True))) == count
    for request, position, token, value in zip(requests, positions, ids, values, strict=True):
        number = int(request[1:].partition("-")[0])
        assert value[:2].tolist() == [number, position] and served.ids[request][position] == token


def _parquet(target: Path) -> tuple[Any, Any, Any, Any]:
    import pandas as pd

    frame = pd.read_parquet(target)
    assert not frame["response"].eq(False).any()
    return frame["request_id"], frame["position"], frame["token_id"], list(frame[NAMES[0]])


def _npy(target: Path) -> tuple[Any, Any, Any, Any]:
    names = json.loads((target / "requests.json").read_text())
    numbers, positions, ids = (
        np.load(target / f"{name}.npy").tolist() for name in ("request", "positions", "token_ids")
    )
    values = np.load(target / f"{NAMES[0]}.npy", mmap_mode="r")
    assert values.dtype == np.float32 and np.load(target / f"{NAMES[1]}.npy").shape == (len(ids), 2, 3)
    return [names[number] for number in numbers], positions, ids, values


def test_pieces_of_a_context_are_boxes(run: Run, served: Served, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", "arrow", NAMES, context=4)
    rows = _stream(tmp_path / "out")
    assert len(rows) == done.items
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["features"][NAMES[0]] == {"shape": [4, 6], "dtype": "float32", "_type": "Array2D"}
    assert info["features"][NAMES[1]] == {"shape": [4, 2, 3], "dtype": "float32", "_type": "Array3D"}
    for row in rows:
        request, first = run.request(row["request_id"]), row["first_position"]
        assert torch.equal(torch.tensor(row[NAMES[0]]).bfloat16(), request[LAYER][first : first + 4])
        assert torch.tensor(row[NAMES[1]]).shape == (4, 2, 3)
        assert row["token_ids"] == request.token_ids[first : first + 4].tolist()
    assert sorted(done.left_out) == sorted(each for each, ids in served.ids.items() if len(ids) < 4)


@pytest.mark.parametrize("format", FORMATS)
def test_a_request_with_gaps_is_left_out_and_counted(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached, whole = "cached-00000000", "whole-00000001"
    steps: list[Rows] = [[(cached, 2, 4), (whole, 2, 0)], [(cached, 1, 6), (whole, 1, 2)]]

    def tensors(step: int, rows: Any) -> dict[str, torch.Tensor]:
        return {"layer": torch.arange(2.0 * sum(row["rows"] for row in rows)).view(-1, 2)}

    def extra(step: int) -> dict[str, Any]:
        prompts = [(cached, list(range(6))), (whole, [7, 8])] if not step else [(cached, [6]), (whole, [9])]
        told = {"first_position": 0} if not step else {}
        entries = [
            {
                "request_id": request,
                "first_position": 6 if request == cached else 2,
                **told,
                "prompt": 2,
                "ids": ids,
            }
            for request, ids in prompts
        ]
        return {"tokens": entries}

    run = requests_run(tmp_path / "runs", steps, tensors, {cached: 4}, "safetensors", extra)
    target = tmp_path / "out"
    words = ["export", run.url, str(target), "--format", format, "--tensor", "layer/outputs"]
    assert main(words) == 0
    said = capsys.readouterr()
    whole_only = FORMATS.index(format) < 3
    assert said.out == f"{target}: {1 if whole_only else 6} items\n"
    note = f"note: 1 request left out, the first is {cached}: positions 0 to 3 are not there\n"
    assert said.err == (note if whole_only else "")
    assert json.loads((target / ABOUT).read_text())["left_out"].keys() == ({cached} if whole_only else set())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_the_adapter_of_each_request_is_told(format: str, backend: str, tmp_path: Path) -> None:
    ids, adapters = ["a-00000000", "b-00000001", "c-00000002"], {"a-00000000": "one", "c-00000002": "two"}
    steps: list[Rows] = [[(each, 1, at) for each in ids] for at in range(4)]

    def extra(step: int) -> dict[str, Any]:
        told: dict[str, Any] = {"prompt": 1, "first_position": step, "ids": [step]}
        return {"tokens": [{"request_id": each, **told} for each in ids]}

    def tensors(step: int, rows: Any) -> dict[str, torch.Tensor]:
        return {"layer": torch.full((3, 2), float(step))}

    run = requests_run(tmp_path / "runs", steps, tensors, backend=backend, extra=extra, adapters=adapters)
    assert {each: run.request(each).adapter for each in ids} == {**adapters, "b-00000001": None}
    data = run.dataset("layer/outputs", per="request")
    assert dict(zip(data.requests, data.adapters, strict=True)) == {**adapters, "b-00000001": None}
    assert (data + data).adapters == data.adapters * 2
    export(run, tmp_path / "out", format, ["layer/outputs"])
    assert json.loads((tmp_path / "out" / ABOUT).read_text())["adapters"] == adapters
    if format == "requests":
        for number, each in enumerate(ids):
            with safe_open(tmp_path / "out" / "hidden_states" / f"hs_{number}.safetensors", "pt") as file:
                assert file.metadata().get("adapter") == adapters.get(each)


def test_what_cannot_be_exported_is_said_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((target, "csv", NAMES), {}, "there is no format 'csv'; there are requests, hf"),
        ((target, "npy", NAMES), {"context": 4}, "npy has no pieces of a context's length"),
        (
            (target, "requests", NAMES),
            {},
            "must be of one dtype and shape",
        ),
        ((target, "requests", NAMES[:1]), {"loss": "some"}, "loss='some' is neither"),
        ((target, "hf", ["layers_0/outputs + layers_1/outputs"]), {}, "cannot be added up: bfloat16"),
        ((target, "hf", [NAMES[0], NAMES[0]]), {}, "a tensor is named twice"),
        ((target, "hf", ["layer_0/outputs"]), {}, "did you mean 'layers_0/outputs'"),
        ((tmp_path / "full", "hf", NAMES), {}, "is there already; export into a new directory"),
    ]
    for given, keys, message in cases:
        with pytest.raises(TlcoreError, match=message):
            export(run, *given, **keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "runs"]


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_sums_that_torch_does_not_have_are_refused(format: str, tmp_path: Path) -> None:
    def tensors(step: int, rows: Any) -> dict[str, torch.Tensor]:
        return {"layer": torch.ones(2, 3).to(torch.float8_e4m3fn)}

    run = requests_run(tmp_path / "runs", [[("a-00000000", 2, 0)]], tensors)
    with pytest.raises(
        ReadError, match="outputs' cannot be added up: torch has no sum of float8_e4m3fn; name"
    ):
        export(run, tmp_path / "out", format, ["layer/outputs + layer/outputs"])
    assert not (tmp_path / "out").exists()
    assert export(run, tmp_path / "out", format, ["layer/outputs"]).items == 2


def test_without_token_ids_only_rows_are_exported(tmp_path: Path) -> None:
    def tensors(step: int, rows: Any) -> dict[str, torch.Tensor]:
        return {"layer": torch.ones(2, 3, dtype=torch.complex64), "other": torch.ones(2)}

    run = requests_run(tmp_path / "runs", [[("a-00000000", 2, 0)]], tensors)
    for format in ("requests", "hf", "arrow"):
        with pytest.raises(ReadError, match="not all token ids are known, which the format"):
            export(run, tmp_path / "out", format, ["other/outputs"])
    with pytest.raises(ReadError, match="is of complex64, which this format has no type for"):
        export(run, tmp_path / "out", "npy", ["layer/outputs"])
    assert export(run, tmp_path / "out", "npy", ["other/outputs"]).items == 2
    assert not (tmp_path / "out" / "token_ids.npy").exists()
    import pandas as pd

    export(run, tmp_path / "table", "parquet", ["other/outputs"])
    assert pd.read_parquet(tmp_path / "table")["other/outputs"].tolist() == [1.0, 1.0]
