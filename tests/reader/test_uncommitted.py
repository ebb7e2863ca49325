"""What the reader says of runs that were cut off: ledgers over ranks, and tensors without a step's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tlcore.ledger import Counts
from tlcore.record import Record
from tlcore.testing import RunWriter, every_dtype, make_record, make_run, make_summary
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.sink import SafetensorsSink

SINKS: dict[str, Any] = {"pt": PtSink, "safetensors": SafetensorsSink}


def write_rank(
    backend: str, directory: Path, rank: int, steps: int, failed: int = 0, close: bool = True
) -> None:
    """A rank that stores two tensors a step, then counts ``failed`` ones that never were."""
    run = make_run(directory, rank, world_size=2)
    sink = RunWriter(SINKS[backend](), run=run, backend=backend)
    label = "" if rank == 0 else "_rank_1"
    for step in range(steps):
        records = [make_record(f"step_{step}/{m}/outputs_cpu{label}", torch.ones(2), rank) for m in "ab"]
        sink.write(records)
        sink.commit_step(make_summary(step, records, rank))
        run.ledger.add(Counts(captured=2, stored=2))
    run.ledger.add(Counts(captured=failed, failed=failed))
    if failed:
        run.ledger.add(Counts(reasons={"failed: OSError": failed}))  # type: ignore[arg-type]
    if close:
        sink.close()


@pytest.mark.parametrize("backend", SINKS)
def test_the_ledger_is_the_sum_over_all_ranks(backend: str, tmp_path: Path) -> None:
    write_rank(backend, tmp_path / "run", 0, steps=2, failed=3)
    write_rank(backend, tmp_path / "run", 1, steps=2, failed=1)
    ledger = tlcore.open_run(tmp_path / "run").ledger
    assert (ledger.captured, ledger.stored, ledger.failed) == (12, 8, 4)
    assert ledger.reasons == {"failed: OSError": 4}
    assert ledger.balanced


@pytest.mark.parametrize("backend", SINKS)
@pytest.mark.parametrize("crashed", [0, 1])
def test_a_rank_that_crashed_counts_with_its_steps_and_the_other_in_full(
    crashed: int, backend: str, tmp_path: Path
) -> None:
    for rank in (0, 1):
        write_rank(backend, tmp_path / "run", rank, steps=2, failed=3, close=rank != crashed)
    run = tlcore.open_run(tmp_path / "run")
    assert run.state == "incomplete"
    assert (run.ledger.captured, run.ledger.stored, run.ledger.failed) == (11, 8, 3)


def cut_off(tmp_path: Path, records: list[Record], shard_bytes: int = 1 << 20) -> tlcore.Run:
    """A safetensors run whose step has its shards but no ``step.json``."""
    sink = RunWriter(SafetensorsSink(shard_bytes), run=make_run(tmp_path / "run"), backend="safetensors")
    sink.write(records)
    sink.commit_step(make_summary(0, records))
    (tmp_path / "run/step_0/step.json").unlink()
    return tlcore.open_run(tmp_path / "run")


def test_sealed_shards_of_an_uncommitted_step_are_read(tmp_path: Path) -> None:
    tensors = {f"step_0/m/{name}_cpu": tensor for name, tensor in every_dtype().items()}
    tensors["step_0/m/scalar_cpu"] = torch.tensor(2.5)
    records = [make_record(name, tensor) for name, tensor in tensors.items()]
    records.append(make_record("step_0/n/inputs_0_cpu", torch.tensor(2.5), alias_of="step_0/m/scalar_cpu"))
    step = cut_off(tmp_path, records).step(0)
    assert not step.complete
    assert set(step.names) == {record.name for record in records}
    for record in records:
        found, expected = step[record.name], record.tensor()
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bytes(found.reshape(-1).view(torch.uint8)) == bytes(record.data)
    assert step.calls == ["m", "n"]


@pytest.mark.parametrize("damage", ["cut", "length", "text", "offsets"])
def test_a_damaged_shard_of_an_uncommitted_step_hides_nothing_else(damage: str, tmp_path: Path) -> None:
    records = [
        make_record(f"step_0/{m}/outputs_cpu", torch.full((40,), float(i))) for i, m in enumerate("ab")
    ]
    run = cut_off(tmp_path, records, shard_bytes=200)
    first, _ = sorted((tmp_path / "run/step_0").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    if damage == "cut":
        data = data[:20]
    elif damage == "length":
        data[:8] = (1 << 40).to_bytes(8, "little")
    elif damage == "text":
        data[8] = 0
    else:
        data = bytearray(bytes(data).replace(b"[0,160]", b"[0,999]"))
    first.write_bytes(data)
    step = run.step(0)
    assert torch.equal(step["step_0/b/outputs_cpu"], torch.full((40,), 1.0))
    if damage == "offsets":
        with pytest.raises(tlcore.ReadError, match="offsets"):
            step["step_0/a/outputs_cpu"]
    else:
        assert step.names == ["step_0/b/outputs_cpu"]
