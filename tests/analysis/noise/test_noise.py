"""Verdicts in units of noise, on models whose noise is added by hand."""

from __future__ import annotations

import json
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
from tlcore.engine.hooks.tracing import TRACES
from tlcore.errors import ConfigError

X = torch.linspace(-1, 1, 64 * 16).reshape(64, 16)
Capture = Callable[..., Path]


class Jitter(nn.Module):
    """Adds noise that a seed decides on, none by default."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.seed = 0.0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed))
        return x * (1 + self.scale * noise) if self.scale else x * 1.0


class Bend(nn.Module):
    """Changes its input as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fault(x * 1.0)


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    def run(seed: int = 0, scale: float = 1e-3, x: Any = X, fault: Any = None, **keys: Any) -> Path:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), Jitter(), nn.Linear(16, 16), Bend(), nn.Linear(16, 4))
        jitter, bend = model[1], model[3]
        assert isinstance(jitter, Jitter) and isinstance(bend, Bend)
        jitter.seed, jitter.scale = seed, scale
        if fault is not None:
            bend.fault = fault
        with tlcore.capture(model, output_dir=str(tmp_path / "out"), **keys) as captured:
            model(x)
        return Path(captured.url)

    return run


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def one_row(x: torch.Tensor) -> torch.Tensor:
    x[17] *= 1.02
    return x


def one_value(x: torch.Tensor) -> torch.Tensor:
    at = x.abs().flatten().argmax()
    x.view(-1)[at] *= 1.02
    return x


def nan(x: torch.Tensor) -> torch.Tensor:
    x[3, 3] = torch.nan
    return x


def test_a_clean_run_is_within_the_noise_and_different_without(capture: Capture) -> None:
    a, b, c = (capture(seed) for seed in range(3))
    assert not tlcore.compare(a, b).equal
    found = tlcore.compare(a, b, noise=c)
    assert found.equal and found.first_divergence is None and found.first_difference is not None
    units = [each.noise.units for each in found.results if each.noise is not None]
    assert units and all(0.1 < each < 2 for each in units)
    assert any("were held against the noise of one further run of A: 0 are beyond" in n for n in found.notes)
    assert found.to_json()["noise"] == {"runs": [str(c)], "factor": 3.0}


@pytest.mark.parametrize("fault", [times(1.01), one_row, one_value, nan], ids=lambda f: f.__name__)
def test_a_fault_is_named_in_units_of_the_noise_where_it_is_born(capture: Capture, fault: Any) -> None:
    a, b, noise = capture(0), capture(1, fault=fault), [capture(2), capture(3)]
    first = tlcore.compare(a, b, noise=noise).first_divergence
    assert first is not None and (first.module, first.direction, first.born) == ("3", "outputs", True)
    held = first.result.noise
    assert held is not None and held.runs == 2 and held.units > 3
    measure = {"one_row": "row", "one_value": "value", "nan": "special"}.get(fault.__name__, held.measure)
    assert held.measure == measure
    assert ("where there is no noise" if fault is nan else "times the noise") in str(first)
    # A larger factor takes it for noise.
    if fault is not nan:
        assert tlcore.compare(a, b, noise=noise, noise_factor=held.units * 2).equal


def test_what_is_within_the_tolerance_may_be_beyond_the_noise(capture: Capture) -> None:
    a, b = capture(0, 0.0), capture(0, 0.0, fault=times(1 + 2**-22))
    assert tlcore.compare(a, b).equal
    found = tlcore.compare(a, b, noise=capture(0, 0.0))
    first = found.first_divergence
    assert first is not None and first.module == "3" and "there is no noise" in str(first)
    assert any("equal to A bit by bit in these tensors, so that any difference" in n for n in found.notes)
    noise = first.to_json()["noise"]
    assert noise["units"] == "inf" and json.dumps(found.to_json(), allow_nan=False)
    # A tolerance that was asked for must be exceeded as well.
    assert tlcore.compare(a, b, noise=capture(0, 0.0), rtol=1e-5, atol=1e-5).equal


def test_noise_that_rests_on_few_values_is_not_taken_for_little(capture: Capture) -> None:
    def rounds(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A few values that round the other way, as in bfloat16 between two kernels."""

        def fault(x: torch.Tensor) -> torch.Tensor:
            flat = x.view(-1)
            at = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(seed))[: 1 + 2 * seed]
            flat[at] *= 1 + 2**-23
            return x

        return fault

    a, c = capture(0, 0.0), capture(0, 0.0, fault=rounds(0))
    for seed in (1, 2, 3, 4, 5):
        assert tlcore.compare(a, capture(0, 0.0, fault=rounds(seed)), noise=c).equal
    assert not tlcore.compare(a, capture(0, 0.0, fault=times(1 + 2**-18)), noise=c).equal


def test_tensors_that_no_further_run_has_are_held_against_the_tolerance(capture: Capture) -> None:
    a, b, c = capture(0), capture(1), capture(2, module_call_match=r"^[01]$")
    found = tlcore.compare(a, b, noise=c)
    first = found.first_divergence
    assert first is not None and (first.module, first.direction) == ("2", "inputs")
    assert any("have no counterpart in them" in note for note in found.notes)


def test_whole_numbers_have_noise_too(tmp_path: Path) -> None:
    class Ranks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argsort(dim=-1)

    def run(seed: int, scale: float) -> str:
        model = nn.Sequential(Jitter(), Ranks())
        model[0].seed, model[0].scale = seed, scale  # type: ignore[assignment]
        with tlcore.capture(model, output_dir=str(tmp_path)) as captured:
            model(torch.randn(64, 16, generator=torch.Generator().manual_seed(9)))
        return str(captured.url)

    a, b, c = run(0, 0.01), run(1, 0.01), run(2, 0.01)
    assert not tlcore.compare(a, b).equal
    assert tlcore.compare(a, b, noise=c).equal
    assert not tlcore.compare(a, run(1, 0.5), noise=c).equal


def test_rows_are_found_in_other_batches_and_the_report_asks_for_them(tmp_path: Path) -> None:
    def run(order: str, seed: int, factor: float = 1.0) -> str:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), Jitter(), nn.Linear(16, 16), Bend())
        model[1].seed, model[1].scale = seed, 1e-3  # type: ignore[assignment]
        model[3].fault = times(factor)  # type: ignore[assignment]
        x = torch.stack([torch.sin(torch.arange(80.0).reshape(5, 16) + ord(name)) for name in order])
        with (
            tlcore.capture(model, output_dir=str(tmp_path)) as captured,
            captured.step(rows=[None if name == "-" else name for name in order]),
        ):
            model(x)
        return str(captured.url)

    a, b, c = run("ab", 0), run("--ab", 1), run("b-a", 2)
    plain = tlcore.compare(a, b)
    assert not plain.equal and any("differ in nothing but batches" in note for note in plain.notes)
    found = tlcore.compare(a, b, noise=c)
    assert found.equal and {each.noise is not None for each in found.results[-4:]} == {True}
    first = tlcore.compare(a, run("ba-", 1, 1.01), noise=c).first_divergence
    assert first is not None and (first.module, first.born) == ("3", True)
    # Where the further run repeats A bit by bit, it shows no noise of other batches: the tolerance holds.
    silent = tlcore.compare(a, b, noise=a)
    assert not silent.equal and any("do not show that noise" in note for note in silent.notes)


def test_parts_that_are_added_up_have_the_noise_of_their_sum(tmp_path: Path) -> None:
    class Split(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * 0.25, x * 0.75

    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * 1.0

    def run(layer: nn.Module, seed: int, factor: float = 1.0) -> str:
        model = nn.Sequential(Jitter(), layer)
        model[0].seed, model[0].scale = seed, 1e-3  # type: ignore[assignment]
        with tlcore.capture(model, output_dir=str(tmp_path), module_call_match="^1$") as captured:
            model(X * factor)
        return str(captured.url)

    a, b, c = run(Split(), 0), run(Whole(), 1), run(Split(), 2)
    assert not tlcore.compare(a, b, sums=[0, 1]).equal
    found = tlcore.compare(a, b, sums=[0, 1], noise=[c])
    assert found.equal and all(each.noise for each in found.results)
    assert not tlcore.compare(a, run(Whole(), 1, 1.01), sums=[0, 1], noise=[c]).equal


def test_other_processes_hold_against_noise_as_well(capture: Capture) -> None:
    a, b, c = capture(0), capture(1, fault=times(1.01)), capture(2)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = tlcore.compare(a, b, noise=c, executor=pool)
    assert found.to_json() == tlcore.compare(a, b, noise=c).to_json()


def test_the_command_takes_further_runs(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c, d = (str(capture(seed)) for seed in range(4))
    assert main(["compare", a, b]) == 1
    assert "a rerun of A, given with --noise, tells" in capsys.readouterr().out
    assert main(["compare", a, b, "--noise", c, d]) == 0
    assert main(["compare", a, b, "--noise", c, "--noise", d, "--noise-factor", "0.01"]) == 1
    assert "times the noise" in capsys.readouterr().out
    assert main(["compare", a, b, "--noise", c, "--noise-factor", "0"]) == 2
    assert "is not a factor" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="noise_factor"):
        tlcore.compare(a, b, noise=c, noise_factor=float("nan"))
    # Held against itself, no difference would ever be beyond the noise.
    with pytest.raises(ConfigError, match=r"noise: .* is B itself"):
        tlcore.compare(a, b, noise=[c, b])


@pytest.mark.skipif(not TRACES, reason="this torch is too old for taps in compiled models")
def test_runs_that_show_compiled_code_otherwise_are_told_apart(tmp_path: Path) -> None:
    def run(factor: float, **keys: Any) -> str:
        model = nn.Sequential(nn.Identity(), Bend())
        model[1].fault = times(factor)  # type: ignore[assignment]
        with tlcore.capture(model, output_dir=str(tmp_path), **keys) as captured:
            model(torch.ones(2, 4))
        return str(captured.url)

    notes = tlcore.compare(run(1.0), run(1.5, compiled="taps")).notes
    assert any("compiled code is captured (eager-steps against taps" in note for note in notes)
    (tmp_path / "dump").mkdir()
    torch.save({"1": torch.ones(2, 4)}, tmp_path / "dump" / "dump.pt")
    notes = tlcore.compare(run(1.5), tmp_path / "dump", ignore_missing=True).notes
    assert any("does not tell its versions and settings" in note for note in notes), notes
    assert not any("compiled code" in note for note in notes)
    assert any(
        "same versions, dtypes and batches" in note for note in tlcore.compare(run(1.0), run(1.5)).notes
    )
