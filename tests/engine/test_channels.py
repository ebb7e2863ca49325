"""`"capture": "channels"`: running statistics for each channel over a run's steps, and no tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

import tlcore
from tests.engine.samples import PROMPTS, forward, llama, padded
from tests.ranked import ranks_run
from tests.reading import command
from tests.sinks import MemorySink
from tests.statistics.test_channels import on_host
from tests.toys import model, run
from tlcore.config.configuration import load_config
from tlcore.engine.batch import Batch
from tlcore.engine.hooks import copies
from tlcore.engine.hooks.collector import Collector
from tlcore.engine.pipeline.channels import Channels
from tlcore.errors import BackendError, ConfigError, MissingError, ReadError, VerifyError
from tlcore.ledger import CHANNELS_ONLY, NO_CHANNELS
from tlcore.reader import Run
from tlcore.statistics.channel_file import ChannelTables, decode, encode
from tlcore.testing import FailingStore, MemoryStore

BACKENDS = ["pt", "safetensors"]
FILE = "channels.safetensors"


class Mixed(nn.Module):
    """Has tensors with channels and some without."""

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> Any:
        return x * 2, places + 1, x.sum(), x[:, : int(places[0])], x > 0


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = Mixed()

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> Any:
        return self.mixed(x, places)


def captured(directory: Path, steps: int = 3, **keys: Any) -> tuple[Run, list[torch.Tensor]]:
    torch.manual_seed(0)
    module, given = model(), [torch.randn(5, 4) + 10 for _ in range(steps)]
    keys = {"module_call_match": ".", "log_step_ids": [], "capture": "channels", **keys}
    with tlcore.capture(module, output_dir=str(directory), **keys) as capture:
        for each in given:
            module(each)
    assert capture.ledger.balanced
    return tlcore.open_run(capture.url), given


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_statistics_are_those_of_all_steps(backend: str, tmp_path: Path) -> None:
    stored, given = captured(tmp_path, backend=backend)
    everything = torch.cat(given).double()
    for name in ("0/inputs_0_cpu", "0/inputs_0"):
        found = stored.channels(name)
        assert (found.count == 15).all() and found.channels == 4
        assert np.allclose(found.mean, everything.mean(0).numpy(), rtol=1e-12)
        assert np.allclose(found.var, everything.var(0, unbiased=False).numpy(), rtol=1e-9)
        assert np.array_equal(found.min, everything.amin(0).numpy())
        assert np.array_equal(found.max, everything.amax(0).numpy())
    # What was overwritten in place is counted as it was handed on.
    assert (stored.channels("0/outputs").min < 0).any() and (stored.channels("1/outputs").min >= 0).all()
    assert stored.channels("1/outputs").zeros.sum() > 0
    ledger = stored.ledger
    assert ledger.captured == ledger.skipped == ledger.reasons[f"skipped: {CHANNELS_ONLY.reason}"] == 18
    assert ledger.bytes_stored == 0 and stored.verify() == 0
    names = {f"{place}/{side}_cpu" for place in "012" for side in ("inputs_0", "outputs")}
    assert set(stored.channel_names) == names
    assert stored.step(1).names == [] and stored.steps == [0, 1, 2]


def test_what_has_no_channels_is_counted_and_not_copied(tmp_path: Path) -> None:
    module = Body()
    with tlcore.capture(module, output_dir=str(tmp_path), module_call_match="mixed", log_step_ids=[],
                        capture="channels") as capture:  # fmt: skip
        for width in (2, 3):
            module(torch.ones(3, 4), torch.tensor([width, 2]))
    stored = tlcore.open_run(capture.url)
    assert set(stored.channel_names) == {
        "mixed/inputs_0_cpu", "mixed/outputs_0_cpu", "mixed/outputs_3_cpu",
    }  # fmt: skip
    # One whose last dimension is not channels but something that changes.
    assert stored.channels("mixed/outputs_3").channels == 2
    assert dict(stored.ledger.reasons) == {
        f"skipped: {CHANNELS_ONLY.reason}": 5,
        f"skipped: {NO_CHANNELS.reason}": 8,
        "skipped: another number of channels than before": 1,
    }


def test_rows_that_were_not_chosen_are_not_among_them(tmp_path: Path) -> None:
    keys = {"capture": "channels", "module_call_match": [r"layers\.1$"]}
    whole = forward(llama(), tmp_path, padded(PROMPTS), **{**keys, "capture": "tensor"})
    last = forward(llama(), tmp_path, padded(PROMPTS), rows="last", **keys)
    rows = torch.stack([whole.request(each)["model.layers.1/outputs_cpu"][-1] for each in "012"]).double()
    found = last.channels("model.layers.1/outputs")
    assert (found.count == 3).all() and np.allclose(found.mean, rows.mean(0).numpy(), rtol=1e-9)

    name = "model.layers.1/outputs"
    rows = torch.cat([whole.request(each)[f"{name}_cpu"] for each in "012"]).double()
    kept = forward(llama(), tmp_path, padded(PROMPTS), rows={"from": 0}, **keys).channels(name)
    assert (kept.count == len(rows)).all() and np.allclose(kept.mean, rows.mean(0).numpy(), rtol=1e-9)
    everything = forward(llama(), tmp_path, padded(PROMPTS), **keys).channels(name)
    tokens = padded(PROMPTS)["attention_mask"].numel()
    assert (everything.count == tokens).all() and tokens > len(rows)


def test_a_limit_on_what_is_stored_is_none_on_what_is_looked_at(tmp_path: Path) -> None:
    run, given = captured(tmp_path, steps=4, max_run_bytes=100)
    assert (run.channels("0/inputs_0").count == sum(len(each) for each in given)).all()


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class FailsOnce(MemorySink):
        def commit_step(self, step: Any) -> None:
            if step.step == 1:
                raise OSError(28, "No space left on device")
            super().commit_step(step)

    _, capture = run(model(), steps=3, log_step_ids=[], capture="channels", backend=FailsOnce(),
                     output_dir=str(tmp_path))  # fmt: skip
    found = decode((Path(capture.url) / FILE).read_bytes())
    assert found.steps == 2 and {table[0, 0] for table in found.tables.values()} == {4.0}
    # What was never to be stored has not failed.
    assert capture.ledger.skipped == capture.ledger.captured == 18


def test_it_is_there_before_the_end_and_after_a_crash(tmp_path: Path) -> None:
    module = model()
    capture = tlcore.capture(module, output_dir=str(tmp_path), log_step_ids=[], capture="channels")
    with capture:
        module(torch.ones(2, 4))
        capture.session.flush()
        found = tlcore.open_run(capture.url)
        assert found.state == "incomplete" and (found.channels("0/inputs_0").count == 2).all()
        module(torch.ones(2, 4))
        capture.session.flush()
        assert (found.channels("0/inputs_0").count == 2).all()
        found.refresh()
        assert (found.channels("0/inputs_0").count == 4).all()


def test_a_store_that_refuses_is_tried_again() -> None:
    inner = MemoryStore()
    channels = Channels(FailingStore(inner, ["put"], failures=2), 0, 0.0)
    channels.examine(Batch(0))
    with pytest.raises(BackendError):
        channels.commit(0)
    with pytest.raises(BackendError):
        channels.save()
    channels.save()
    assert [entry.name for entry in inner.list()] == [FILE]
    # Without news there is nothing to write, and what was discarded is none.
    inner.delete(FILE)
    channels.examine(Batch(1))
    channels.discard(1)
    channels.save()
    assert list(inner.list()) == []


def test_a_store_that_refuses_is_not_asked_for_each_step() -> None:
    store = FailingStore(MemoryStore(), ["put"], failures=100)
    channels = Channels(store, 0, 3600.0)
    refused = 0
    for step in range(5):
        channels.examine(Batch(step))
        try:
            channels.commit(step)
        except BackendError:
            refused += 1
    assert refused == 1


def test_ranks_and_runs_are_merged(tmp_path: Path) -> None:
    one, first = captured(tmp_path / "one")
    other, second = captured(tmp_path / "other", steps=5)
    together = torch.cat([*first, *second]).double()
    merged = tlcore.merge_channels([one.channels("0/inputs_0"), other.channels("0/inputs_0")])
    assert (merged.count == 40).all() and np.allclose(merged.mean, together.mean(0).numpy(), rtol=1e-12)
    # The processes of a group: each has rows of its own.
    document = json.loads((Path(one.url) / "run.json").read_text())
    (Path(one.url) / "run.json").write_text(json.dumps({**document, "world_size": 2}))
    tables = decode((Path(other.url) / FILE).read_bytes())
    renamed = {name.replace("_cpu", "_cpu_rank_1"): table for name, table in tables.tables.items()}
    about = {name.replace("_cpu", "_cpu_rank_1"): each for name, each in tables.about.items()}
    data = encode(ChannelTables(5, renamed, about))
    (Path(one.url) / "channels_rank_1.safetensors").write_bytes(data)
    both = tlcore.open_run(one.url)
    assert np.allclose(both.channels("0/inputs_0").table, merged.table)
    assert (both.channels("0/inputs_0_cpu_rank_1").count == 25).all()


def _with_files(run: Run, name: str, tables: list[torch.Tensor]) -> Run:
    about = {"module": "m", "direction": "outputs", "path": [], "dtype": "float32"}
    for rank, tensor in enumerate(tables):
        own = f"m/{name}_cpu" + (f"_rank_{rank}" if rank else "")
        found = ChannelTables(1, {own: on_host(tensor)}, {own: about})
        suffix = f"_rank_{rank}" if rank else ""
        path = Path(run.url) / f"channels{suffix}.safetensors"
        path.write_bytes(encode(found))
    return tlcore.open_run(run.url)


def test_ranks_of_one_model_have_the_same_rows_or_parts_of_them(tmp_path: Path) -> None:
    halves = [torch.ones(3, 2), torch.full((3, 2), 2.0)]
    whole = ranks_run(tmp_path / "whole", [{"m": each} for each in halves], {})
    same = _with_files(whole, "outputs", [torch.ones(3, 4)] * 2)
    assert (same.channels("m/outputs").count == 3).all()
    sharded = {"m": {"outputs": {"": {"dim": 1}}}}
    cut = ranks_run(tmp_path / "cut", [{"m": each} for each in halves], sharded)
    parts = _with_files(cut, "outputs", halves)
    with pytest.raises(
        ReadError, match="each rank has only a part of 'm/outputs'; name one of m/outputs_cpu, "
    ):
        parts.channels("m/outputs")
    assert (parts.channels("m/outputs_cpu_rank_1").mean == 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_go_along_when_a_run_is_converted(backend: str, tmp_path: Path) -> None:
    stored, _ = captured(tmp_path / "first", backend=backend)
    other = {"pt": "safetensors", "safetensors": "pt"}[backend]
    assert command("convert", stored.url, str(tmp_path / "other"), "--backend", other)[0] == 0
    there = tmp_path / "other" / stored.id
    assert (there / FILE).read_bytes() == (Path(stored.url) / FILE).read_bytes()
    assert tlcore.open_run(there).verify() == 0
    tree = fsspec.filesystem("tlcore", run=stored.url, skip_instance_cache=True)
    assert tree.cat_file(FILE) == (there / FILE).read_bytes()


def test_damage_is_found(tmp_path: Path) -> None:
    stored, _ = captured(tmp_path)
    path = Path(stored.url) / FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    damaged = tlcore.open_run(stored.url)
    with pytest.raises(VerifyError, match=r"channels\.safetensors: damaged, its tables do not have the hash"):
        damaged.verify()
    with pytest.raises(ReadError, match="damaged"):
        damaged.channels("0/inputs_0")
    assert command("convert", stored.url, str(tmp_path / "other"), "--backend", "pt")[0] == 2
    path.write_bytes(b"x")
    assert "no file of channel statistics" in command("verify", stored.url)[1]


def test_commands_show_them_and_say_where_they_are(tmp_path: Path) -> None:
    stored, _ = captured(tmp_path)
    status, said = command("show", stored.url, "1/outputs")
    assert status == 0 and "1/outputs: 4 channels, over all steps" in said and "nonfinite" in said
    status, said = command("show", stored.url, "1/outputs_cpu", "--json")
    assert status == 0 and json.loads(said)["count"] == [15] * 4
    status, said = command("show", stored.url, "step_0/1/outputs")
    assert status == 2 and "run.channels('1/outputs_cpu') has them" in said
    with pytest.raises(MissingError, match="no channel statistics of '9/outputs'"):
        stored.channels("9/outputs")
    plain, _ = captured(tmp_path / "plain", capture="tensor")
    with pytest.raises(
        MissingError, match='has no channel statistics; it was captured with "capture": "tensor"'
    ):
        plain.channels("0/outputs")
    shutil.copy(Path(stored.url) / FILE, Path(plain.url) / "channels_rank_9.safetensors")
    # A file of a rank that the run does not have.
    assert tlcore.open_run(plain.url).channel_names == []


def test_what_a_device_computes_itself_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without one can show it: the vector takes the tensor's place."""
    plain, _ = captured(tmp_path / "plain")
    monkeypatch.setattr(Collector, "_new_walker", lambda self: None)
    monkeypatch.setattr(copies, "measures_itself", lambda tensor: True)
    measured, _ = captured(tmp_path / "measured")
    assert measured.channel_names == plain.channel_names
    for name in plain.channel_names:
        assert np.allclose(measured.channels(name).table, plain.channels(name).table, rtol=1e-9)


@pytest.mark.gpu
def test_a_model_on_a_gpu(tmp_path: Path) -> None:
    module, x = nn.Linear(4, 8).cuda(), torch.randn(64, 4, device="cuda")
    with tlcore.capture(module, output_dir=str(tmp_path), capture="channels", log_step_ids=[]) as capture:
        for _ in range(3):
            out = module(x)
    found = tlcore.open_run(capture.url).channels("_root/outputs")
    assert (found.count == 192).all() and np.allclose(
        found.mean, out.double().mean(0).cpu().numpy(), rtol=1e-9
    )


def test_it_stores_no_tensor_so_it_asks_for_none() -> None:
    with pytest.raises(ConfigError, match="on_condition"):
        load_config({"capture": "channels", "on_condition": "nonfinite"})
    assert not load_config({"capture": "channels"}).keeps_token_ids
