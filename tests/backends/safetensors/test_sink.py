"""The ``safetensors`` sink: shards that the plain library opens, and where it splits them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tlcore
from tests.backends.raw import committed, step_documents
from tlcore.errors import BackendError
from tlcore.record import Record
from tlcore.registry import open_store
from tlcore.testing import RunWriter, every_dtype, make_record, make_run, make_summary
from tlcore_backends.safetensors.sink import SafetensorsSink


def store(sink: SafetensorsSink, url: Path | str, records: list[Record], **run: Any) -> dict[str, Any]:
    """Store ``records`` as step 0 and give its ``step.json``."""
    writer = RunWriter(sink, run=make_run(url, **run), backend="safetensors")
    for record in records:
        writer.write([record])
    writer.commit_step(make_summary(0, records, writer.run.rank, rows=[{"request_id": "r"}], note=1))
    writer.close()
    return step_documents(open_store(url))[0][1]


def test_a_shard_opens_in_the_plain_library(tmp_path: Path) -> None:
    tensors = {f"step_0/m/{name}_cpu": tensor for name, tensor in every_dtype().items()}
    records = [make_record(name, tensor) for name, tensor in tensors.items()]
    records.append(
        make_record("step_0/n/inputs_0_cpu", tensors["step_0/m/int8_cpu"], alias_of=records[0].name)
    )
    document = store(SafetensorsSink(), tmp_path / "run", records)
    assert [shard["file"] for shard in document["shards"]] == ["step_0/shard_rank_0_0.safetensors"]
    path = tmp_path / "run/step_0/shard_rank_0_0.safetensors"
    assert path.stat().st_size == document["shards"][0]["bytes"]
    with safe_open(path, "pt") as shard:
        assert set(shard.keys()) == set(tensors)
        metadata = shard.metadata()
        for name, tensor in tensors.items():
            loaded = shard.get_tensor(name)
            marked = metadata.get(f"tlcore.dtype.{name}")
            assert marked == (None if loaded.dtype == tensor.dtype else str(tensor.dtype)[6:])
            assert bytes(loaded.reshape(-1).view(torch.uint8)) == bytes(tensor.view(torch.uint8))
            if marked is None:
                assert loaded.shape == tensor.shape
        complex_parts = shard.get_tensor("step_0/m/complex128_cpu")
    assert (complex_parts.dtype, complex_parts.shape) == (torch.float64, (3, 2))
    assert metadata["tlcore.alias.step_0/n/inputs_0_cpu"] == records[0].name
    assert metadata["format"] == "pt"


def test_step_json_has_everything_else(tmp_path: Path) -> None:
    record = make_record("step_0/m/outputs_cpu", torch.arange(4.0))
    document = store(SafetensorsSink(), tmp_path / "run", [record])
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["run/run.json", "run/step_0/shard_rank_0_0.safetensors", "run/step_0/step.json"]
    (entry,) = document["records"]
    begin, end = entry.pop("offsets")
    assert entry == {**record.describe(), "shard": "step_0/shard_rank_0_0.safetensors"}
    assert (tmp_path / "run" / entry["shard"]).read_bytes()[begin:end] == bytes(record.data)
    assert document["structures"]["m/outputs.json"]["file"] == "step_0/m/outputs_cpu.pt"
    assert (document["calls"], document["rows"], document["note"]) == (["m"], [{"request_id": "r"}], 1)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert (run["state"], run["backend"]) == ("complete", "safetensors")


def test_a_shard_is_closed_before_it_grows_too_large(tmp_path: Path) -> None:
    sizes = [10, 10, 20, 70, 5, 5]
    records = [make_record(f"step_0/m/{i}_cpu", torch.full((n,), i).byte()) for i, n in enumerate(sizes)]
    alias = make_record("step_0/n/0_cpu", torch.full((10,), 0).byte(), alias_of=records[0].name)
    document = store(SafetensorsSink(shard_bytes=40), tmp_path / "run", [*records, alias])
    assert [entry["shard"][-13] for entry in document["records"]] == ["0", "0", "0", "1", "2", "2", "0"]
    with safe_open(tmp_path / "run/step_0/shard_rank_0_2.safetensors", "pt") as shard:
        assert shard.metadata()["tlcore.alias.step_0/n/0_cpu"] == records[0].name
    found = committed(open_store(tmp_path / "run"))[0]
    assert [int(found[f"step_0/m/{i}_cpu"][0]) for i in range(6)] == list(range(6))


def test_a_full_header_closes_the_shard_too(tmp_path: Path) -> None:
    records = [make_record(f"step_0/{'m' * 150}/{i}_cpu", torch.tensor(i)) for i in range(600)]
    aliases = [
        make_record(f"step_0/{'n' * 150}/{i}_cpu", torch.tensor(i), alias_of=records[i].name)
        for i in range(600)
    ]
    large = make_record("step_0/m/large_cpu", torch.rand(1 << 19))
    document = store(SafetensorsSink(), tmp_path / "run", [*records, *aliases, large])
    assert len(document["shards"]) == 3
    named: dict[str, str] = {}
    for entry in document["shards"]:
        with safe_open(tmp_path / "run" / entry["file"], "pt") as shard:
            named |= {k: v for k, v in shard.metadata().items() if k.startswith("tlcore.alias.")}
    assert named == {f"tlcore.alias.{alias.name}": alias.alias_of for alias in aliases}
    found = committed(open_store(tmp_path / "run"))[0]
    assert all(found[record.name] == i for i, record in enumerate(records))
    assert torch.equal(found[large.name], large.tensor())


@pytest.mark.parametrize("kind", ["aliases", "without elements"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_header_is_full_beside_no_payload_too(tmp_path: Path, kind: str, remote: bool) -> None:
    empty = torch.empty(0, 4)
    first = make_record("step_0/m/0_cpu", empty)
    many = [
        make_record(f"step_0/{'n' * 150}/{i}_cpu", empty, alias_of=first.name if kind == "aliases" else None)
        for i in range(600)
    ]
    large = make_record("step_0/m/large_cpu", torch.rand(1 << 19))
    url = f"memory://{kind.replace(' ', '-')}/run" if remote else str(tmp_path / "run")
    document = store(SafetensorsSink(), url, [first, *many, large])
    assert len(document["shards"]) > 1
    place = open_store(url)
    assert {e.name: e.size for e in place.list() if e.name.endswith(".safetensors")} == {
        shard["file"]: shard["bytes"] for shard in document["shards"]
    }
    found = committed(place)[0]
    assert len(found) == len(many) + 2
    assert torch.equal(found[large.name], large.tensor())
    assert not tlcore.open_run(url).incomplete_steps
    assert tlcore.open_run(url).verify() == len(found)


def test_small_shards_are_not_mostly_header(tmp_path: Path) -> None:
    records = [make_record(f"step_0/m/{i}_cpu", torch.rand(300_000)) for i in range(20)]
    document = store(SafetensorsSink(shard_bytes=1 << 20), tmp_path / "run", records)
    assert len(document["shards"]) == 20
    assert sum(shard["bytes"] for shard in document["shards"]) < 1.1 * sum(r.nbytes for r in records)


@pytest.mark.parametrize("elements", [3, 1 << 19])
def test_local_and_remote_shards_have_the_same_bytes(tmp_path: Path, elements: int) -> None:
    records = [make_record(f"step_0/m/{i}_cpu", torch.rand(elements)) for i in range(2)]
    urls = (str(tmp_path / "run"), f"memory://same-bytes-{elements}/run")
    shards = []
    for url in urls:
        document = store(SafetensorsSink(), url, records)
        shards.append(open_store(url).get(document["shards"][0]["file"]))
    assert shards[0] == shards[1]


def test_ranks_write_shards_of_their_own(tmp_path: Path) -> None:
    for rank in (1, 0):
        label = "" if rank == 0 else "_rank_1"
        record = make_record(f"step_0/m/outputs_cpu{label}", torch.full((2,), rank), rank)
        store(SafetensorsSink(), tmp_path / "run", [record], rank=rank, world_size=2)
    assert {str(p.relative_to(tmp_path / "run")) for p in tmp_path.rglob("*.*")} == {
        *("run.json", "close_rank_1.json", "step_0/step.json", "step_0/step_rank_1.json"),
        *("step_0/shard_rank_0_0.safetensors", "step_0/shard_rank_1_0.safetensors"),
    }
    other = json.loads((tmp_path / "run/step_0/step_rank_1.json").read_text())
    assert list(other["structures"]) == ["m/outputs_rank_1.json"]
    assert set(committed(open_store(tmp_path / "run"))[0]) == {
        "step_0/m/outputs_cpu",
        "step_0/m/outputs_cpu_rank_1",
    }


def test_an_abandoned_step_leaves_no_unfinished_file(tmp_path: Path) -> None:
    sink = SafetensorsSink()
    sink.open(make_run(tmp_path / "run", fsync=True))
    sink.write([make_record("step_0/a/outputs_cpu", torch.rand(1 << 19))])
    assert len(list((tmp_path / "run/step_0").glob("*.tmp"))) == 1
    kept = make_record("step_1/a/outputs_cpu", torch.rand(1 << 19))
    sink.write([kept])
    sink.commit_step(make_summary(1, [kept]))
    sink.write([make_record("step_2/a/outputs_cpu", torch.rand(1 << 19))])
    sink.close()
    assert list(tmp_path.rglob("*.tmp")) == []
    assert list(committed(open_store(tmp_path / "run"))) == [1]


def test_a_disk_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = SafetensorsSink()
    sink.open(make_run(tmp_path / "run"))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tlcore_backends.storage.atomic_file.write_all", full)
        with pytest.raises(BackendError, match=r"shard_rank_0_0.safetensors: No space left on device"):
            sink.write([make_record("step_0/a/outputs_cpu", torch.rand(1 << 19))])
    sink.write([make_record("step_1/a/outputs_cpu", torch.ones(2))])
    sink.commit_step(make_summary(1))
    sink.close()
    assert list(tmp_path.rglob("*.tmp")) == []
