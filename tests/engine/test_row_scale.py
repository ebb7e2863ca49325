"""`store_dtype: "int8"`: rows that end in their scale, made on its device and undone where it is read."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jsonschema import Draft202012Validator
from torch import nn

import tlcore
from tests.engine.samples import LAYER, PROMPTS, generated, llama, padded
from tests.engine.test_store_dtype import Body, Mixed, captured
from tests.layout.test_run_schemas import SHARED, STEP
from tests.ranked import ranks_run
from tests.reading import command
from tlcore.engine.staging.conversion import converted
from tlcore.errors import ReadError
from tlcore.layout.row_scale import restored
from tlcore.statistics.stored import summarize

pytestmark = pytest.mark.slow

BACKENDS = ["pt", "safetensors"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INT8: dict[str, Any] = {"store_dtype": "int8"}


def plainly(packed: torch.Tensor) -> torch.Tensor:
    """What whoever opens the file makes of it, as the documentation says."""
    return packed[..., :-4] * packed[..., -4:].clone(memory_format=torch.contiguous_format).view(
        torch.float32
    )


def there_and_back(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values as they are read, and the scale of each row (the true one, also of rows with NaN)."""
    packed = converted(values, torch.int8)
    assert packed.dtype == torch.int8 and packed.shape == (*values.shape[:-1], values.shape[-1] + 4)
    found = restored(packed, str(values.dtype).removeprefix("torch."))
    assert found.dtype == values.dtype and found.shape == values.shape
    word = packed[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.int32)
    odd = word & 0x7F800000 == 0x7F800000
    return found, torch.where(odd, (word & 0x3FFFFF) << 9, word).view(torch.float32).double()


def check_bound(values: torch.Tensor) -> None:
    found, scale = there_and_back(values)
    exact, back = values.double(), found.double()
    finite = exact.isfinite()
    assert torch.equal(exact.isnan(), back.isnan()) and torch.equal(finite, back.isfinite())
    assert torch.equal(exact[exact.isinf()], back[exact.isinf()])
    # Half a step, what float32 rounds in a division, and what the dtype itself rounds.
    ulp = exact.abs() * torch.finfo(values.dtype).eps + torch.finfo(values.dtype).tiny
    bound = scale * (0.5 + 1e-4) + ulp
    assert bool(((exact - back).abs() <= bound)[finite].all())


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_value_is_farther_off_than_half_its_rows_scale(dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9))
    numbers = st.floats(width=32) | st.floats(-0.125, 0.125, width=32)
    values = torch.from_numpy(data.draw(arrays.arrays(np.float32, shape, elements=numbers)))
    check_bound(values.to(dtype))
    check_bound(values.to(dtype).transpose(0, -1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_are_odd(dtype: torch.dtype) -> None:
    info, nan, inf = torch.finfo(dtype), math.nan, math.inf
    most = min(info.max, torch.finfo(torch.float32).max)
    rows = [
        [0.0] * 6,
        [-0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [most, -most, 1.0, 0.0, -1.0, most / 2],
        [info.tiny, -info.tiny, info.tiny / 4, 0.0, 0.0, 0.0],
        [nan, 1.0, -2.0, 0.5, 0.0, 3.0],
        [nan] * 6,
        [inf, -inf, 1.0, -1.0, 0.25, 0.0],
        [-inf] * 6,
        [inf, nan, most, -most, 1.0, 0.0],
        [-inf, 0.0, 0.0, 0.0, 0.0, 0.0],
        [127.0, 126.0, -127.0, 1.0, -1.0, 0.5],
    ]
    values = torch.tensor(rows, dtype=torch.float64).to(dtype)
    check_bound(values)
    found = there_and_back(values)[0]
    assert torch.equal(found[0], torch.zeros(6, dtype=dtype)) and torch.equal(found[-1, :5], values[-1, :5])
    # Whoever knows of no NaN in scales sees that something is amiss in these rows, and nothing in others.
    simple = plainly(converted(values, torch.int8))
    odd = ~values.isfinite().all(-1)
    assert simple[odd].isnan().all() and simple[~odd].isfinite().all()
    assert torch.allclose(
        simple[~odd].to(dtype), found[~odd], rtol=1e-7 if dtype == torch.float64 else 0, atol=0
    )
    # The same whether the host could look before or not.
    for row in range(len(rows)):
        alone = converted(values[row : row + 1], torch.int8)
        assert torch.equal(alone, converted(values, torch.int8)[row : row + 1])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    values = torch.randn(6, 40)
    values[1, 2], values[2, 3], values[3] = math.nan, -math.inf, torch.finfo(torch.float32).max
    packed = converted(values, torch.int8)
    found, before = restored(packed, "float32"), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(converted(values, torch.int8), packed)
        again = restored(packed, "float32")
    finally:
        torch.set_default_dtype(before)
    assert again.dtype == torch.float32 and torch.equal(again.nan_to_num(7), found.nan_to_num(7))


def test_beyond_float32_it_becomes_the_largest_that_there_is() -> None:
    values = torch.tensor([[1e300, -1e300, 1.0, 0.0, 5e37, -1e38]], dtype=torch.float64)
    found = there_and_back(values)[0]
    assert (
        found.isfinite().all()
        and found[0, 0] == -found[0, 1] > 3e38
        and (found[0, 4:] - values[0, 4:]).abs().max() < 2e36
    )


def test_long_tensors_are_packed_in_pieces() -> None:
    values = torch.randn(70_000, 100)
    assert torch.equal(converted(values, torch.int8)[69_990:], converted(values[69_990:], torch.int8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_stored_and_what_is_left_as_it_is(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(6, 8), torch.ones(6, dtype=torch.bool)
    run = captured(tmp_path, Body(), x, mask, backend=backend, **INT8)
    assert run.verify() == run.ledger.stored == run.ledger.captured == 10
    Draft202012Validator(STEP, registry=SHARED).validate(run.json("step_0/step.json"))
    for place, value in enumerate(Mixed()(x, mask)):
        name = f"step_0/mixed/outputs_{place}"
        found, record = run.tensor(name), run.step(0).record(name)
        node = run.json("step_0/mixed/outputs.json")["items"][place]
        if value.is_floating_point() and value.dim() > 1:
            packed = converted(value, torch.int8)
            assert (record["dtype"], record["shape"]) == ("int8", [*value.shape[:-1], value.shape[-1] + 4])
            assert record["bytes"] == packed.numel() and record["row_scale"] == node["row_scale"] == "float32"
            assert record["converted_from"] == str(value.dtype).removeprefix("torch.")
            assert torch.equal(run.tensor(name, dtype="stored"), packed)
            assert found.dtype == value.dtype and found.shape == value.shape
            assert torch.equal(found, restored(packed, record["converted_from"]))
            assert torch.equal(run.tensor(name, dtype="original"), found)
            assert run.tensor(name, dtype="float64").dtype == torch.float64
        else:
            assert torch.equal(found, value) and found.dtype == value.dtype
            assert "row_scale" not in record and "converted_from" not in record
    call = run.step(0).call("mixed")
    assert call.inputs.args[0].shape == (6, 8) and call.inputs.args[0].dtype == torch.float32


def test_a_stranger_reads_the_file_as_the_documentation_says(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 16)
    run = captured(tmp_path, nn.Sequential(nn.Identity()), x, backend="safetensors", **INT8)
    files = list(Path(run.url).rglob("*.safetensors"))
    tensors = {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
    packed = [value for value in tensors.values() if value.shape[-1:] == (20,)]
    assert packed and all(torch.equal(plainly(each), run.tensor("step_0/0/outputs")) for each in packed)
    run = captured(tmp_path, nn.Sequential(nn.Identity()), x, backend="pt", **INT8)
    loaded = torch.load(Path(run.url) / "step_0" / "0" / "outputs_cpu.pt", weights_only=True)
    assert torch.equal(plainly(loaded), run.tensor("step_0/0/outputs"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_joined_and_converting_keeps_all(backend: str, tmp_path: Path) -> None:
    x = torch.randn(3, 4, 8)
    run = captured(tmp_path / "a", nn.Sequential(nn.Linear(8, 8)), x, backend=backend, steps=4, **INT8)
    joined = run.tensor("0/outputs_cpu")
    assert joined.dtype == torch.float32 and joined.shape == (12, 4, 8)
    assert torch.equal(joined[:3], run.tensor("step_0/0/outputs"))
    assert run.tensor("0/outputs_cpu", dtype="stored").shape == (12, 4, 12)
    other = {"pt": "safetensors", "safetensors": "pt"}[backend]
    for source, target, kind in ((run.url, "b", other), (str(tmp_path / "b" / run.id), "c", backend)):
        assert command("convert", source, str(tmp_path / target), "--backend", kind)[0] == 0
        again = tlcore.open_run(tmp_path / target / run.id)
        for number in run.steps:
            keys = ("name", "dtype", "converted_from", "row_scale", "hash", "shape")
            assert [{k: r[k] for k in keys} for r in again.step(number).records] == [
                {k: r[k] for k in keys} for r in run.step(number).records
            ]
            assert again.json(f"step_{number}/0/outputs.json") == run.json(f"step_{number}/0/outputs.json")
        assert torch.equal(again.tensor("0/outputs_cpu"), joined) and again.verify() == run.verify()


def test_a_tensor_that_has_scales_in_some_steps_alone_is_not_joined(tmp_path: Path) -> None:
    values = [torch.randn(3, 8), torch.zeros(3, 12, dtype=torch.int8), torch.randn(3, 8).bfloat16()]
    module = nn.Sequential(nn.Identity())
    for backend in BACKENDS:
        with tlcore.capture(
            module, output_dir=str(tmp_path), backend=backend, log_step_ids=[], **INT8
        ) as capture:
            for value in values:
                module(value)
        run = tlcore.open_run(capture.url)
        with pytest.raises(ReadError, match="different forms"):
            run.tensor("0/outputs_cpu")
        for number, value in enumerate(values):
            found = run.tensor(f"step_{number}/0/outputs")
            assert found.dtype == value.dtype and torch.allclose(found.float(), value.float(), atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_and_data_sets_have_values(backend: str, tmp_path: Path) -> None:
    module = llama()
    plain = generated(module, tmp_path / "a", padded(PROMPTS), backend=backend)
    run = generated(module, tmp_path / "b", padded(PROMPTS), backend=backend, **INT8)
    for number in plain.requests:
        mine, theirs = run.request(number), plain.request(number)
        assert mine.names == theirs.names
        assert mine.dtype_and_shape(LAYER) == theirs.dtype_and_shape(LAYER)
        assert mine[LAYER].dtype == torch.float32 and torch.allclose(mine[LAYER], theirs[LAYER], atol=0.05)
    name = LAYER.removesuffix("_cpu")
    data, expected = run.dataset([name]), plain.dataset([name])
    assert data.forms == expected.forms and len(data) == len(expected)
    for index in (0, 3, len(data) - 1):
        assert torch.equal(data[index]["positions"], expected[index]["positions"])
        assert torch.allclose(data[index][name], expected[index][name], atol=0.05)
    by_request = run.dataset([name], per="request")
    assert torch.equal(
        by_request[1][name], run.request(by_request.requests[int(by_request[1]["request"])])[LAYER]
    )
    status, said = command("export", run.url, str(tmp_path / "out"), "--format", "requests", "--tensor", name)
    assert status == 0, said
    file = next((tmp_path / "out").rglob("*.safetensors"))
    states = safetensors.torch.load_file(file)["hidden_states"]
    assert states.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_compare_stats_and_show_are_of_the_values(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    last, x = nn.Linear(32, 16), torch.randn(3, 4)
    module = nn.Sequential(nn.Linear(4, 32), nn.GELU(), last)
    more: dict[str, Any] = {"backend": backend, "steps": 2}
    plain, run = captured(tmp_path, module, x, **more), captured(tmp_path, module, x, **more, **INT8)
    found = tlcore.compare(plain, run)
    assert (
        found.equal and found.counts["missing"] == 0 and not tlcore.compare(plain, run, rtol=0, atol=0).equal
    )
    assert "what store_dtype rounded away: B was stored as int8, and computed in float32" in str(found.notes)
    assert tlcore.compare(run, captured(tmp_path, module, x, **more, **INT8)).counts["bitwise"]
    with torch.no_grad():
        last.weight += 0.5
    first = tlcore.compare(captured(tmp_path, module, x, **more), run).first_divergence
    assert first is not None and first.module == "2"
    for each in tlcore.stats(run).tensors:
        values = run.tensor(each.name)
        assert (each.dtype, each.shape) == ("float32", tuple(values.shape)) and each.values == summarize(
            values
        )
    status, said = command("show", run.url, "step_0/0/outputs", "--json")
    assert status == 0 and '"row_scale": "float32"' in said and json.loads(said)["bytes"] == 3 * 36


def test_statistics_at_capture_are_of_the_values(tmp_path: Path) -> None:
    x = torch.randn(4, 16)
    x[1, 2], x[2, 3] = math.nan, -math.inf
    for capture, condition in (("both", None), ("tensor", "nonfinite")):
        keys = {"capture": capture, "on_condition": condition, **INT8}
        module = nn.Sequential(nn.Identity(), nn.Linear(16, 16))
        run = captured(tmp_path, module, x, **keys)
        assert run.ledger.balanced and run.ledger.captured == run.ledger.stored
        if capture == "both":
            found, expected = run.stats("step_0/0/outputs"), summarize(run.tensor("step_0/0/outputs"))
            keys_of = ("min", "max", "numel", "zeros", "nans", "infs")
            assert all(getattr(found, key) == getattr(expected, key) for key in keys_of) and found.nans == 1
            assert math.isclose(found.std or 0, expected.std or 1)
            shown = {(each.dtype, each.shape) for each in tlcore.stats(run).tensors}
            assert shown == {("float32", (4, 16))}
        finite = captured(tmp_path, module, x.nan_to_num(0, 0, 0), **keys)
        assert (finite.ledger.stored == 0) == (condition is not None)
        if condition is not None:
            skipped = finite.step(0).call("0").outputs
            assert (skipped.dtype, skipped.shape) == ("torch.float32", (4, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_that_ranks_hold_are_joined_as_values(backend: str, tmp_path: Path) -> None:
    values = torch.randn(4, 24)
    side = {"cut": {"outputs": {"*": {"dim": -1}}}, "added": {"outputs": {"*": {"sum": True}}}}
    ranks = [{"cut": values[:, :12], "added": values}, {"cut": values[:, 12:], "added": values * 2}]
    run = ranks_run(tmp_path, ranks, side, backend, **INT8)
    assert run.verify() == run.ledger.stored
    step, bound = run.step(0), values.abs().amax() / 100
    for name, expected in (("cut", values), ("added", values * 3)):
        joined = step.tensor(f"step_0/{name}/outputs", unshard=True)
        assert joined.dtype == torch.float32 and (joined - expected).abs().max() < 3 * bound
        streamed = step.payload(f"step_0/{name}/outputs", unshard=True)
        assert torch.equal(streamed.read(0, expected.numel()).view(expected.shape), joined)
    wholes = {each["module"]: each for each in step.wholes if each["direction"] == "outputs"}
    assert (wholes["cut"]["dtype"], wholes["cut"]["shape"]) == ("float32", [4, 24])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_is_replayed_and_the_tree_of_files_is_as_stored(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    linear, x = nn.Linear(64, 64), torch.randn(12, 64)
    run = captured(tmp_path, nn.Sequential(linear), x, backend=backend, **INT8)
    assert tlcore.replay(run, "step_0/0", linear).equal
    assert not tlcore.replay(run, "step_0/0", nn.Linear(64, 64)).equal
    tree = fsspec.filesystem("tlcore", run=run.url, skip_instance_cache=True)
    for record in json.loads(tree.cat_file("step_0/step.json"))["records"]:
        data = tree.cat_file(record["file"])
        found = torch.load(io.BytesIO(data), weights_only=True)
        assert torch.equal(found, run.tensor(record["name"], dtype="stored"))
        assert (record["file_bytes"], record["shape"]) == (len(data), list(found.shape))
        assert record["row_scale"] == "float32"


def test_a_stream_gives_values_from_anywhere(tmp_path: Path) -> None:
    x = torch.randn(3, 5, 70_000)
    run = captured(tmp_path, nn.Sequential(nn.Identity()), x, **INT8)
    stream, flat = run.step(0).payload("step_0/0/outputs"), run.tensor("step_0/0/outputs").flatten()
    assert (stream.dtype, stream.shape) == (torch.float32, (3, 5, 70_000))
    for begin, end in ((0, 10), (69_999, 70_001), (0, 0), (1_049_999, 1_050_000), (139_000, 400_000)):
        assert torch.equal(stream.read(begin, end), flat[begin:end])
    stream.close()


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    from tlcore.reader.documents import record_problem

    run = captured(tmp_path, nn.Sequential(nn.Identity()), torch.randn(3, 8), **INT8)
    record = dict(run.json("step_0/step.json")["records"][0])
    assert record_problem(record, 0) is None
    for change in (
        {"row_scale": "float64"},
        {"row_scale": None},
        {"converted_from": None},
        {"dtype": "int16"},
        {"shape": [36]},
        {"shape": [12, 3]},
        {"converted_from": "int8"},
        {"converted_from": "float4"},
    ):
        assert "scale" in str(record_problem({**record, **change}, 0)), change


@pytest.mark.gpu
def test_a_device_packs_as_the_host_does(tmp_path: Path) -> None:
    x = torch.randn(64, 32, device="cuda")
    x[3, 1], x[5, 2] = math.inf, math.nan
    x[7] = 0
    run = captured(tmp_path, nn.Sequential(nn.Identity()), x, module_call_match=None, **INT8)
    packed = run.tensor("step_0/0/outputs", dtype="stored")
    assert torch.equal(packed, converted(x.cpu(), torch.int8))
