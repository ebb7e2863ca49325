"""Comparing runs of small models: matching, verdicts, formats, exit codes, and damaged runs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main
from tlcore.analysis.measure import EXACT
from tlcore.compare_il import main as compare_il
from tlcore.errors import ConfigError, ReadError

Capture = Callable[..., Path]
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.linear(self.norm(x))
        return result


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    def run(module: nn.Module, x: Any = X, steps: int = 1, **keys: Any) -> Path:
        with tlcore.capture(module, output_dir=str(tmp_path / "out"), log_step_ids=[], **keys) as captured:
            for _ in range(steps):
                module(x)
        return Path(captured.url)

    return run


def first(a: Path, b: Path, **keys: Any) -> Any:
    return tlcore.compare(a, b, **keys).to_json()["first_divergence"]


@pytest.mark.parametrize("deep", [False, True])
def test_two_runs_of_one_model_are_equal(model: nn.Module, capture: Capture, deep: bool) -> None:
    result = tlcore.compare(capture(model, steps=2), capture(model, steps=2), deep=deep)
    assert result.equal and result.first_divergence is None and result.first_difference is None
    assert result.counts["bitwise"] == len(result.results) == 2 * 20


def test_a_changed_epsilon_is_born_in_its_norm(model: Any, capture: Capture) -> None:
    changed = copy.deepcopy(model)
    changed[1].norm.eps = 0.1
    expected = {"step": 0, "module": "1.norm", "call": 0, "direction": "outputs", "born": True}
    expected |= {"within": None, "within_call": 0}
    assert first(capture(model), capture(changed)) == expected


def test_a_flipped_bit_is_found_in_the_child_not_in_its_parent(model: Any, capture: Capture) -> None:
    changed = copy.deepcopy(model)
    bits = changed[2].linear.weight.data.view(torch.int32)
    bits[0, 0] ^= 1 << 20
    found = first(capture(model), capture(changed))
    assert (found["module"], found["born"]) == ("2.linear", True)


def test_another_input_is_passed_on(model: Any, capture: Capture) -> None:
    found = first(capture(model), capture(model, X + 1))
    assert (found["module"], found["direction"], found["born"]) == ("", "inputs", False)


def test_nan_is_found_where_it_begins_and_equal_nans_are_equal(model: Any, capture: Capture) -> None:
    broken = copy.deepcopy(model)
    broken[1].linear.bias.data[0] = torch.nan
    plain, with_nan = capture(model), capture(broken)
    result = tlcore.compare(plain, with_nan)
    assert result.first_divergence is not None and result.first_divergence.module == "1.linear"
    measures = result.first_divergence.result.measures
    assert measures is not None and measures.nans == (0, 3) and measures.max_abs == 0
    assert tlcore.compare(with_nan, capture(broken), deep=True).equal


def test_tolerances_are_the_dtypes_or_the_ones_given(model: Any, capture: Capture) -> None:
    a, b = capture(model), capture(copy.deepcopy(model).to(torch.bfloat16), X.to(torch.bfloat16))
    assert tlcore.compare(a, b, rtol=1, atol=1).equal
    assert not tlcore.compare(a, b, rtol=0, atol=0).equal
    strict = tlcore.compare(a, b, rtol=1, atol=1, check_dtype=True).first_divergence
    assert strict is not None and "dtypes" in str(strict.result.reason)


def test_two_floating_dtypes_are_held_by_the_norm_unless_a_tolerance_is_given(
    model: Any, capture: Capture
) -> None:
    a, b = capture(model), capture(copy.deepcopy(model).to(torch.bfloat16), X.to(torch.bfloat16))
    found = tlcore.compare(a, b)
    assert found.equal and any(note.startswith("float32 is held against bfloat16") for note in found.notes)
    assert any((each.measures or EXACT).mismatched for each in found.results)
    strict = tlcore.compare(a, b, rtol=1.6e-2)
    assert not strict.equal and not any("is held against" in note for note in strict.notes)
    with torch.no_grad():
        model[0].linear.weight *= 1.1
    assert not tlcore.compare(capture(model), b).equal


def test_calls_pair_in_order_and_modules_are_renamed(capture: Capture) -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(self.layer(x))

    class New(Old):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = self.layer, copy.deepcopy(self.layer)
            del self.layer

        def forward(self, x: torch.Tensor) -> Any:
            return self.two(self.one(x))

    old = Old()
    new = New()
    for part in (new.one, new.two):
        part.load_state_dict(old.layer.state_dict())
    a, b = capture(new), capture(old)
    assert tlcore.compare(a, b, maps=["^(one|two)$=layer"]).equal
    assert tlcore.compare(a, b).counts["missing"] == 8
    with pytest.raises(ConfigError, match="REGEX=REPLACEMENT"):
        tlcore.compare(a, b, maps=["layer"])
    with pytest.raises(ConfigError, match="not a regular expression"):
        tlcore.compare(a, b, maps=["(=layer"])


def test_a_single_pattern_needs_no_list(model: Any, capture: Capture) -> None:
    a, b = capture(model), capture(model[:2])
    found = tlcore.compare(a, b, modules="norm$", maps="^2=1", ignore_missing=True)
    assert {result.module for result in found.results} == {"0.norm", "1.norm"}
    assert {tensor.module for tensor in tlcore.stats(a, modules="norm$").tensors} == {
        "0.norm",
        "1.norm",
        "2.norm",
    }
    with pytest.raises(ConfigError, match="not a sequence of output positions"):
        tlcore.compare(a, b, sums="01")  # type: ignore[arg-type]


def test_a_split_residual_is_added_up(capture: Capture) -> None:
    class Split(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * 0.25, x * 0.75

    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * 1.0

    class Root(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(x)

    a, b = capture(Root(Split())), capture(Root(Whole()), X.unsqueeze(0))
    assert tlcore.compare(a, b, sums=[0, 1]).equal
    assert tlcore.compare(b, a, sums=[0, 1]).equal
    assert not tlcore.compare(a, b).equal


def test_what_only_one_run_has_is_missing(model: Any, capture: Capture) -> None:
    whole, part = capture(model), capture(model, module_call_match=r"^0")
    for pair, label in (((whole, part), "A"), ((part, whole), "B")):
        result = tlcore.compare(*pair)
        assert not result.equal and result.first_divergence is None
        assert {r.reason for r in result.results if not r.agrees} == {f"only {label} has it"}
    assert tlcore.compare(whole, part, modules=["^0"]).equal
    assert not tlcore.compare(whole, whole, steps=[0, 7]).equal


@pytest.mark.parametrize("how", ["file gone", "file cut", "step gone", "step uncommitted"])
def test_a_truncated_copy_never_agrees(model: Any, capture: Capture, how: str, tmp_path: Path) -> None:
    run = capture(model, steps=2)
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    tensor = copied / "step_1" / "1.norm" / "outputs_cpu.pt"
    if how == "file gone":
        tensor.unlink()
    elif how == "file cut":
        tensor.write_bytes(tensor.read_bytes()[:-100])
    elif how == "step gone":
        shutil.rmtree(copied / "step_1")
    else:
        (copied / "step_1" / "step.json").unlink()
    for pair in ((run, copied), (copied, run)):
        assert not tlcore.compare(*pair).equal
        assert main(["compare", *map(str, pair)]) == 1


def test_what_is_no_run_cannot_be_compared(
    model: Any, capture: Capture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, foreign = str(capture(model)), tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "step_0").mkdir()
    assert main(["compare", run, str(foreign)]) == 2
    assert "not a run" in capsys.readouterr().err
    with pytest.raises(ReadError, match="no tensor to compare"):
        tlcore.compare(run, run, modules=["nothing"])


def test_the_command_prints_every_format(
    model: Any, capture: Capture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy.deepcopy(model)
    changed[1].norm.eps = 0.1
    a, b = str(capture(model)), str(capture(changed))
    assert main(["compare", a, a]) == 0
    assert capsys.readouterr().out.startswith("the runs agree")
    assert main(["compare", a, b]) == 1
    assert capsys.readouterr().out.startswith("first divergence: 1.norm, outputs of step 0; born here")
    assert main(["compare", a, b, "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["first_divergence"]["module"] == "1.norm"
    assert main(["compare", a, b, "--format", "markdown", "--verbose"]) == 1
    assert capsys.readouterr().out.count("\n| 0 |") == 20
    assert compare_il(["--dir1", a, "--dir2", b, "--rtol", "1e9", "--atol", "1e9", "--steps", "0"]) == 0
    assert compare_il(["--dir1", a, "--dir2", b, "--modules", "^0,^2$", "--output", str(tmp_path / "r")]) == 1
    assert (tmp_path / "r").read_text().startswith("# ")
    assert compare_il(["--dir1", a, "--dir2", str(tmp_path)]) == 2


def test_the_html_report_is_one_file(model: Any, capture: Capture, tmp_path: Path) -> None:
    a, b = str(capture(model)), str(capture(model, X + 1))
    out = tmp_path / "report.html"
    assert main(["compare", a, b, "--format", "html", "--output", str(out)]) == 1
    text = out.read_text()
    assert "<svg" in text and "first divergence: _root, inputs" in text
    assert "src=" not in text and "<link" not in text


@pytest.mark.slow
def test_other_executors_and_progress(model: Any, capture: Capture) -> None:
    a, b = capture(model), capture(model, X + 1)
    seen: list[tuple[int, int]] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = tlcore.compare(a, b, executor=pool, progress=lambda *at: seen.append(at))
    assert result == tlcore.compare(a, b)
    assert seen == [(i, 20) for i in range(1, 21)]
    assert "<table>" in result._repr_html_()
    assert len(result.to_pandas()) == 20
