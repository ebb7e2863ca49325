"""Reading many payloads at a time: the same bytes as one by one, shared ones once, damage named."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

import tlcore
from tlcore.errors import VerifyError
from tlcore.hotpath.reading import read_files
from tlcore.reader import MissingError, bulk
from tlcore.reader.bulk import read_payloads
from tlcore.reader.tensor_bytes import payload
from tlcore_backends.storage.local import LocalStore


@pytest.fixture(params=["pt", "safetensors", "shards"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two steps of a model whose modules hand tensors on, so that many are stored once."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Flatten(0))
    backends = {"pt": "pt", "safetensors": "safetensors", "shards": {"name": "safetensors", "layout": 1}}
    keys: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "backend": backends[request.param],
        "log_step_ids": [],
    }
    with tlcore.capture(model, **keys) as capture:
        model(torch.randn(3, 8))
        model(torch.randn(0, 8))
    return Path(capture.url)


def _check(run: tlcore.Run) -> None:
    for step in run.values():
        found = list(read_payloads(run.stored, step.records, keep=True))
        assert [each.record["name"] for each in found] == step.names
        for each in found:
            assert each.problem is None
            assert each.record["hash"] == f"xxh3-128:{each.digest}"
            assert bytes(each.data) == bytes(payload(step.tensor(each.record["name"])))
        hashes = list(read_payloads(run.stored, step.records, keep=False))
        assert [each.digest for each in hashes] == [each.digest for each in found]
        assert not any(len(each.data) for each in hashes)


@pytest.mark.parametrize("group_bytes", [1, 500, 8 << 20])
def test_groups_of_any_size_give_the_same(
    run: Path, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_GROUP_BYTES", group_bytes)
    _check(tlcore.open_run(run))


def test_a_remote_store_gives_the_same(run: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(run), "/bulk", recursive=True)
    try:
        (root,) = {path.rpartition("/")[0] for path in filesystem.find("/bulk") if path.endswith("/run.json")}
        _check(tlcore.open_run(f"memory:/{root}"))
    finally:
        filesystem.rm("/bulk", recursive=True)


def test_shared_bytes_are_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (run / "segments").exists():
        pytest.skip("segments are read through handles that stay open")
    monkeypatch.setattr(bulk, "_LOCAL_THREADS", 1)
    opened = tlcore.open_run(run)
    records = opened.step(0).records
    read = 0
    get = LocalStore.get

    def counted(store: LocalStore, name: str, start: int = 0, end: int | None = None) -> bytes:
        nonlocal read
        data = get(store, name, start, end)
        read += len(data)
        return data

    def counted_files(target: Any, root: str, names: Sequence[str], sizes: Sequence[int]) -> list[int]:
        nonlocal read
        read += sum(sizes)
        return read_files(target, root, names, sizes)

    monkeypatch.setattr(LocalStore, "get", counted)
    monkeypatch.setattr("tlcore_backends.storage.local.read_files", counted_files)
    list(read_payloads(opened.stored, records, keep=False))
    own = [int(record.get("file_bytes") or record["bytes"]) for record in records if "alias_of" not in record]
    assert len(own) < len(records)
    assert read == sum(own)


def test_a_damaged_copy_of_a_sound_file_is_found(run: Path) -> None:
    record = next(each for each in tlcore.open_run(run).step(0).records if "alias_of" in each)
    if "file" not in record:
        pytest.skip("a shard holds shared bytes once")
    file = run / record["file"]
    content = bytearray(file.read_bytes())
    at = bytes(content).index(bytes(payload(tlcore.open_run(run).tensor(record["name"]))))
    content[at] ^= 1
    copy = run / "copy"
    shutil.copyfile(file, copy)
    copy.write_bytes(content)
    copy.rename(file)
    with pytest.raises(VerifyError) as caught:
        tlcore.open_run(run).verify()
    assert [line.partition(":")[0] for line in caught.value.bad] == [record["file"]]


def test_a_step_lists_nothing_but_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    list_blobs = LocalStore.list

    def counted(store: LocalStore, prefix: str = "") -> Any:
        listed.append(prefix)
        return list_blobs(store, prefix)

    monkeypatch.setattr(LocalStore, "list", counted)
    opened = tlcore.open_run(run)
    step = opened[1]
    for name in step:
        step.tensor(name)
    step.call("0").structure("inputs")
    # The catalogue of a closed run in segments lists everything.
    in_segments = (run / "segments").exists()
    assert listed == ([] if in_segments else ["step_1/"])
    with pytest.raises(MissingError, match="no step 7; it has 0, 1"):
        opened.step(7)
    assert opened.steps == [0, 1]
    # Which steps there are is seen without listing what lies in them.
    assert listed == ([] if in_segments else ["step_1/", "step_7/"])


def test_steps_that_nobody_holds_are_let_go(run: Path) -> None:
    opened = tlcore.open_run(run)
    step = opened.step(0)
    assert opened.step(0) is step
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    assert opened.step(0).complete
