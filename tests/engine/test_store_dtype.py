"""`store_dtype`: wider floating tensors are stored in a narrower dtype, and everything says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from jsonschema import Draft202012Validator
from torch import nn

import tlcore
from tests.engine.samples import LAYER, PROMPTS, generated, llama, padded
from tests.layout.test_run_schemas import SHARED, STEP
from tests.reading import command
from tests.sinks import MemorySink
from tests.toys import model
from tlcore.config.configuration import load_config
from tlcore.engine.staging.conversion import converted
from tlcore.errors import ConfigError, ReadError
from tlcore.reader import Run

BACKENDS = ["pt", "safetensors"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn}


class Mixed(nn.Module):
    """Has tensors of every kind."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return x * 3, x.half(), x.double() * 1e5, mask, mask.long(), x.to(torch.complex64), x.sum(), x[:0]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = Mixed()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.mixed(x, mask)


def captured(directory: Path, module: nn.Module, *given: torch.Tensor, steps: int = 1, **keys: Any) -> Run:
    keys = {"module_call_match": ".", "log_step_ids": [], **keys}
    with torch.no_grad(), tlcore.capture(module, output_dir=str(directory), **keys) as capture:
        for _ in range(steps):
            module(*given)
    assert capture.ledger.balanced
    return tlcore.open_run(capture.url)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_wider_floats_are_stored_in_it_and_others_as_they_are(
    name: str, backend: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x, mask, wanted = torch.randn(6, 8), torch.ones(6, dtype=torch.bool), DTYPES[name]
    run = captured(tmp_path, Body(), x, mask, backend=backend, store_dtype=name)
    plain = Body()(x, mask)
    for place, value in enumerate(plain):
        found = run.tensor(f"step_0/mixed/outputs_{place}")
        record = run.step(0).record(f"step_0/mixed/outputs_{place}")
        if value.is_floating_point() and value.dtype.itemsize > wanted.itemsize:
            assert found.dtype == wanted and record["converted_from"] == str(value.dtype).removeprefix(
                "torch."
            )
            assert torch.equal(found.float(), converted(value, wanted).float())
            original = run.tensor(f"step_0/mixed/outputs_{place}", dtype="original")
            assert original.dtype == value.dtype and torch.equal(original, found.to(value.dtype))
            assert record["bytes"] == value.numel() * wanted.itemsize
        else:
            assert torch.equal(found, value) and found.dtype == value.dtype and "converted_from" not in record
            assert torch.equal(run.tensor(f"step_0/mixed/outputs_{place}", dtype="original"), value)
    distinct = {record["hash"]: record["bytes"] for record in run.step(0).records}
    assert run.ledger.stored == run.ledger.captured == 10 and run.verify() == 10
    assert run.ledger.bytes_captured == sum(each.nbytes for each in (*plain, x, mask))
    assert sum(distinct.values()) <= run.ledger.bytes_stored < run.ledger.bytes_captured
    # The value itself, beyond what rounding does.
    assert torch.allclose(run.tensor("step_0/mixed/inputs_0").float(), x, rtol=0.07, atol=2e-3)


def test_what_is_finite_stays_finite_and_nothing_else_becomes_it() -> None:
    values = torch.tensor([1e30, -1e30, 1.0, 0.0, math.inf, -math.inf, math.nan, 3.4e38])
    for dtype in DTYPES.values():
        found, limit = converted(values, dtype).float(), torch.finfo(dtype).max
        assert found[:4].isfinite().all() and found[7].isfinite() and float(found[0]) <= limit
        assert not found[4:7].isfinite().any()
        if dtype != torch.float8_e4m3fn:
            assert found[4] == math.inf and found[5] == -math.inf
    # Longer than what is converted at a time.
    long = torch.arange(-(2.0**22), 5.0).reshape(-1, 3).t()
    found = converted(long, torch.float16)
    assert found.shape == long.shape and torch.equal(found, long.clamp(-65504, 65504).half())
    big = torch.tensor([1e300, -2.0], dtype=torch.float64)
    assert converted(big, torch.float16).tolist() == [65504.0, -2.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_fit_their_schema_and_converting_keeps_all(backend: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"store_dtype": "bfloat16", "steps": 3, "capture": "both"}
    run = captured(tmp_path / "a", model(), torch.randn(3, 4), backend=backend, **keys)
    document = run.json("step_1/step.json")
    Draft202012Validator(STEP, registry=SHARED).validate(document)
    assert {record["converted_from"] for record in document["records"]} == {"float32"}
    structure = run.json("step_1/0/outputs.json")
    assert (structure["dtype"], structure["converted_from"]) == ("torch.bfloat16", "float32")
    other = {"pt": "safetensors", "safetensors": "pt"}[backend]
    for target, kind in (("b", other), ("c", backend)):
        source = run.url if target == "b" else str(tmp_path / "b" / run.id)
        assert command("convert", source, str(tmp_path / target), "--backend", kind)[0] == 0
        again = tlcore.open_run(tmp_path / target / run.id)
        for number in run.steps:
            mine, theirs = run.step(number), again.step(number)
            said = ("name", "dtype", "converted_from", "hash", "shape")
            assert [{k: r[k] for k in said} for r in mine.records] == [
                {k: r[k] for k in said} for r in theirs.records
            ]
            assert again.json(f"step_{number}/0/outputs.json") == run.json(f"step_{number}/0/outputs.json")
        assert again.verify() == run.verify() == 18
    # The tree that other tools see is that of the run in pt.
    tree = fsspec.filesystem("tlcore", run=str(tmp_path / "b" / run.id), skip_instance_cache=True)
    pt = tmp_path / ("b" if other == "pt" else "c") / run.id
    assert json.loads(tree.cat_file("step_1/step.json")) == json.loads(
        (pt / "step_1" / "step.json").read_text()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_undone_in_every_way_of_reading(backend: str, tmp_path: Path) -> None:
    run = generated(llama(), tmp_path, padded(PROMPTS), backend=backend, store_dtype="bfloat16")
    request = run.request("1")
    rounded, original = request[LAYER], request.tensor(LAYER, dtype="original")
    assert rounded.dtype == torch.bfloat16 and original.dtype == torch.float32
    assert torch.equal(original, rounded.float())
    assert run.step(0).tensor(f"step_0/{LAYER}", dtype="original").dtype == torch.float32
    assert run.step(0).tensor(f"step_0/{LAYER}", dtype="float64").dtype == torch.float64
    assert run.step(0).tensor(f"step_0/{LAYER}", dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ReadError, match="there is no dtype 'float99'"):
        run.tensor(f"step_0/{LAYER}", dtype="float99")
    call = run.step(0).call("model.layers.1")
    assert call.original_inputs.args[0].dtype == torch.float32 != call.inputs.args[0].dtype


def test_steps_are_joined_in_either_dtype(tmp_path: Path) -> None:
    for backend in BACKENDS:
        run = captured(tmp_path, model(), torch.randn(3, 4), backend=backend, store_dtype="float16", steps=4)
        assert run.tensor("0/outputs_cpu").dtype == torch.float16
        joined = run.tensor("0/outputs_cpu", dtype="original")
        assert joined.dtype == torch.float32 and joined.shape == (12, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compare_holds_it_against_an_unconverted_run(backend: str, tmp_path: Path) -> None:
    module, x = model(), torch.randn(3, 4)
    more: dict[str, Any] = {"backend": backend, "steps": 3}
    last = module[2]
    assert isinstance(last, nn.Linear)
    plain = captured(tmp_path, module, x, **more)
    rounded = captured(tmp_path, module, x, store_dtype="bfloat16", **more)
    found = tlcore.compare(plain, rounded)
    assert (
        found.equal
        and found.counts["missing"] == 0
        and not tlcore.compare(plain, rounded, rtol=0, atol=0).equal
    )
    with torch.no_grad():
        last.weight += 0.5
    first = tlcore.compare(captured(tmp_path, module, x, **more), rounded).first_divergence
    assert first is not None and (first.module, first.born) == ("2", True)


def test_the_summary_and_show_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "tlcore"):
        run = captured(tmp_path, model(), torch.randn(3, 4), store_dtype="bfloat16")
    assert "(wider floats as bfloat16)" in caplog.text
    assert run.config["store_dtype"] == "bfloat16"
    status, said = command("show", run.url, "step_0/0/outputs", "--json")
    shown = json.loads(said)
    assert status == 0 and (shown["dtype"], shown["converted_from"]) == ("bfloat16", "float32")


def test_a_call_is_replayed_in_the_dtype_that_it_had(tmp_path: Path) -> None:
    linear = nn.Linear(8, 8)
    module = nn.Sequential(linear)
    run = captured(tmp_path, module, torch.randn(3, 8), store_dtype="bfloat16")
    assert tlcore.replay(run, "step_0/0", linear).equal
    with torch.no_grad():
        linear.weight[2] += 1
    assert not tlcore.replay(run, "step_0/0", linear).equal


def test_rounded_results_are_not_injected(tmp_path: Path) -> None:
    module, x = model(), torch.randn(3, 4)
    run = captured(tmp_path, module, x, store_dtype="bfloat16", module_call_match=None)
    with pytest.raises(ConfigError, match=r"\$\.inject\.run: that run was stored as bfloat16"):
        captured(tmp_path, module, x, inject={"run": run.url, "modules": ["0"]})


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    """Its results, its gradients, and the operators that are heard of it."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), torch.randn(3, 4)
    module(x).sum().backward()
    expected, before = module(x), [each.grad.clone() for each in module.parameters() if each.grad is not None]
    module.zero_grad()
    keys: dict[str, Any] = {"module_call_match": ".", "log_step_ids": [], "ops": ["^1$"]}
    named = []
    for store_dtype in (None, "bfloat16"):
        sink = MemorySink()
        with tlcore.capture(module, backend=sink, output_dir=str(tmp_path), store_dtype=store_dtype, **keys):
            out = module(x)
        assert torch.equal(out, expected)
        out.sum().backward()
        after = [each.grad for each in module.parameters()]
        assert all(
            each is not None and torch.equal(each, old) for each, old in zip(after, before, strict=True)
        )
        module.zero_grad()
        named.append(sorted(sink.tensors))
    assert named[0] == named[1] and any("op." in name for name in named[0])


def test_what_stores_no_tensor_converts_none() -> None:
    for capture in ("stats", "channels"):
        with pytest.raises(ConfigError, match=r"\$\.store_dtype"):
            load_config({"capture": capture, "store_dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="int4"):
        load_config({"store_dtype": "int4"})
    assert (
        load_config({"store_dtype": "float16"}).store_dtype == "float16" and load_config().store_dtype is None
    )


@pytest.mark.gpu
def test_a_device_converts_by_itself(tmp_path: Path) -> None:
    module, x = nn.Linear(8, 8).cuda(), torch.randn(64, 8, device="cuda")
    for name, dtype in DTYPES.items():
        run = captured(tmp_path, module, x, store_dtype=name, module_call_match=None)
        assert torch.equal(run.tensor("step_0/_root/inputs_0").float(), converted(x, dtype).float().cpu())
