"""What ``run.json`` says of the model, its weights and what ran it, and what compare makes of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.engine.environment import environment


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 40))


def weights(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = environment(module)["weights"]
    return found


def test_weights_that_have_no_shape_yet_are_left_out() -> None:
    found = weights(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))
    assert sorted(found["tensors"]) == ["0.bias", "0.weight"] and found["of"] == 2


def test_the_fingerprint_is_that_of_the_values() -> None:
    one = weights(model())
    assert one == weights(model()) and one["of"] == len(one["tensors"]) == 9
    other = model()
    with torch.no_grad():
        other[2].weight.copy_(other[2].weight.T.clone())
    found = weights(other)
    assert found["fingerprint"] != one["fingerprint"]
    changed = [name for name, told in found["tensors"].items() if told != one["tensors"][name]]
    assert changed == ["2.weight"]
    # However they lie in memory.
    with torch.no_grad():
        other[2].weight.data = other[2].weight.data.T
    assert weights(other)["tensors"] == one["tensors"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool]
)
def test_weights_of_any_dtype_are_told(dtype: torch.dtype) -> None:
    holder = nn.Module()
    values = torch.arange(2000).reshape(40, 50).float()
    holder.register_buffer("x", (values % 3).to(dtype))
    first = weights(holder)["tensors"]["x"]
    assert first.startswith(str(dtype).removeprefix("torch."))
    holder.register_buffer("x", ((values + 1) % 3).to(dtype))
    assert weights(holder)["tensors"]["x"] != first


def test_what_cannot_be_read_is_told_by_its_kind_and_harms_nothing() -> None:
    class Strange(nn.Module):
        @property
        def config(self) -> Any:
            raise RuntimeError("not today")

    strange = Strange()
    strange.register_parameter("meta", nn.Parameter(torch.empty(3, 3, device="meta")))
    strange.register_buffer("empty", torch.empty(0))
    strange.register_buffer("sparse", torch.eye(3).to_sparse())
    found = environment(strange)
    assert set(found["weights"]["tensors"]) == {"meta", "empty", "sparse"}
    assert "configuration" not in found and "settings" in found
    assert "weights" not in environment(nn.Identity())


def test_many_tensors_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcore.engine.environment._TENSORS", 4)
    found = weights(model())
    assert found["of"] == 9 and list(found["tensors"]) == ["0.weight", "1.bias", "1.running_mean"]


def test_the_configuration_leaves_out_paths_and_what_is_no_json() -> None:
    holder = nn.Linear(2, 2)
    config = {"_name_or_path": "/secret", "rope_theta": 1e4, "dtype": torch.float32, "eps": float("inf")}
    holder.config = SimpleNamespace(to_dict=lambda: config)  # type: ignore[assignment]
    assert environment(holder)["configuration"] == {
        "rope_theta": 1e4,
        "dtype": "torch.float32",
        "eps": "Infinity",
    }


@pytest.fixture
def captured(tmp_path: Path) -> Callable[..., str]:
    def run(module: Any, **keys: Any) -> str:
        module.eval()
        with tlcore.capture(module, output_dir=str(tmp_path), **keys) as capture:
            module(torch.ones(2, 40, dtype=module[0].weight.dtype))
        return capture.url

    return run


def test_compare_says_which_weights_and_settings_differ(captured: Callable[..., str]) -> None:
    a = captured(model())
    changed = model()
    with torch.no_grad():
        changed[2].weight.mul_(1.5)
    b = captured(changed)
    notes = tlcore.compare(a, b).notes
    assert "the models' weights differ in 1 of 9 tensors, such as 2.weight" in notes
    assert not any("weights differ" in note for note in tlcore.compare(a, captured(model())).notes)
    assert not any("weights differ" in note for note in tlcore.compare(a, captured(model().bfloat16())).notes)
    document = Path(b) / "run.json"
    told = json.loads(document.read_text())
    told["environment"]["settings"]["threads"] += 1
    told["environment"]["configuration"] = {"rope_theta": 5e5}
    document.write_text(json.dumps(told))
    assert any("threads (" in note for note in tlcore.compare(a, b).notes)
    # What only one of them tells is no difference.
    told["environment"]["engine"] = {"compilation": "NONE"}
    document.write_text(json.dumps(told))
    assert not any("compilation" in note for note in tlcore.compare(a, b).notes)
    other = Path(a) / "run.json"
    before = other.read_text()
    other.write_text(json.dumps({**json.loads(before), "environment": {"engine": {"compilation": "FULL"}}}))
    assert any("compilation (FULL against NONE)" in note for note in tlcore.compare(a, b).notes)
    other.write_text(before)
    told["environment"] = "damaged"
    document.write_text(json.dumps(told))
    assert not any("weights differ" in note for note in tlcore.compare(a, b).notes)


@pytest.mark.parametrize(("off", "found"), [(4e-6, False), (5.6e-5, True), (4e-4, True)])
def test_what_other_kernels_round_is_no_divergence_and_ten_times_that_is(
    off: float, found: bool, tmp_path: Path
) -> None:
    """``off`` in the whole tensor, or in one of its rows."""
    values = 100 * torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    for rows in (slice(None), slice(7, 8)):
        urls = []
        for scale, compilation in ((1.0, "NONE"), (1 + off, "VLLM_COMPILE")):
            given = values.clone()
            given[rows] *= scale
            module = nn.Identity()
            with tlcore.capture(module, output_dir=str(tmp_path)) as capture:
                module(given)
            urls.append(capture.url)
            document = Path(capture.url) / "run.json"
            told = json.loads(document.read_text())
            told["environment"]["engine"] = {"compilation": compilation}
            document.write_text(json.dumps(told))
        compared = tlcore.compare(*urls)
        assert compared.equal != found, (off, rows)
        assert any("compilation (NONE against VLLM_COMPILE)" in note for note in compared.notes)


def test_what_is_not_covered_stands_beside_equal(
    captured: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    from tlcore.__main__ import main

    a, b = (captured(model(), module_call_match=["^0$", "^2$"]) for _ in range(2))
    found = tlcore.compare(a, b)
    assert found.equal and found.not_compared == ["A and B captured only what fits ^0$, ^2$"]
    assert main(["compare", a, b]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["the runs agree", "not compared: A and B captured only what fits ^0$, ^2$"]
    assert found.to_json()["not_compared"] == found.not_compared
    whole = tlcore.compare(captured(model()), captured(model()))
    assert whole.equal and whole.not_compared == []
    skipped = [captured(nn.Sequential(nn.Linear(40, 3)), max_tensor_size=41) for _ in range(2)]

    gaps = tlcore.compare(*skipped, rtol=9, atol=9).not_compared
    assert gaps[0].endswith("tensors were stored by neither run and cannot be compared")


@pytest.mark.parametrize(("others", "differ"), [(("0.weight", "2.weight"), False), (("2.bias",), True)])
def test_weights_that_vllm_has_packed_are_not_said_to_differ(
    captured: Callable[..., str], others: tuple[str, ...], differ: bool
) -> None:
    module = model()
    a, b = captured(module), captured(module)
    document = Path(b) / "run.json"
    told = json.loads(document.read_text())
    told["environment"]["model"] = "vllm.model_executor.models.llama.LlamaForCausalLM"
    told["environment"]["weights"]["tensors"].update(dict.fromkeys(others, "float32 0"))
    document.write_text(json.dumps(told))
    for found in (tlcore.compare(a, b), tlcore.compare(b, a)):
        assert any("weights differ" in note for note in found.notes) == differ
    again = tlcore.replay(b, "step_0/2", nn.Linear(40, 40))
    assert not again.equal and "others than" not in str(again)
