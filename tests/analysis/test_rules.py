"""Rules: tolerances by name, what must be there, what is left out, and errors that name the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.analysis.emitting import emitted
from tlcore.__main__ import main
from tlcore.analysis import Comparison
from tlcore.errors import ConfigError

X = torch.linspace(1, 2, 24).reshape(4, 6)
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return lambda **values: emitted(str(tmp_path), values)


def statuses(found: Comparison) -> dict[str, str]:
    return {str(each.path[-1]): each.status for each in found.results}


def ruled(a: str, b: str, **tolerance: Any) -> Comparison:
    return tlcore.compare(a, b, rules={"tolerances": [{"match": "/outputs", **tolerance}]})


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        ({"rel": 0.011}, {"rel": 0.009}),
        ({"abs": 0.021}, {"abs": 0.015}),
        ({"rel": 0.005, "abs": 0.01}, {"rel": 0.005, "abs": 0.001}),
        ({"norm": 0.0105}, {"norm": 0.0095}),
        ({"cosine": 1 - 1e-9}, {"cosine": 1.0, "norm": 0.001}),
        ({"ulp": 200_000}, {"ulp": 50_000}),
        ({"norm": 1}, {"norm": 1, "bitwise": True}),
        ({"norm": 1, "cosine": 0.9}, {"norm": 1, "cosine": 0.9, "rel": 0}),
    ],
    ids=lambda tolerance: "-".join(tolerance),
)
def test_each_kind_of_tolerance_holds(within: dict[str, Any], beyond: dict[str, Any], run: Run) -> None:
    a, b = run(x=X), run(x=X * 1.01)
    assert not tlcore.compare(a, b).equal
    found = ruled(a, b, **within)
    assert found.equal and statuses(found) == {"x": "close"}
    result = ruled(a, b, **beyond).results[0]
    assert result.status == "different" and result.rule == "/outputs"
    assert result.reason is not None and result.reason.startswith("rule '/outputs': ")
    assert result.measures is not None and not result.measures.agrees
    # Equal bits break no rule.
    assert ruled(a, run(x=X.clone()), **beyond).counts["bitwise"] == 1


def test_a_nan_in_one_run_alone_breaks_every_rule(run: Run) -> None:
    changed = X.clone()
    changed[1, 1] = torch.nan
    a, b = run(x=X), run(x=changed)
    for tolerance in ({"norm": 9}, {"cosine": -1}, {"ulp": 1 << 40}, {"abs": 1e9}):
        found = ruled(a, b, **tolerance)
        assert statuses(found) == {"x": "different"}
    assert ruled(b, run(x=changed.clone() * 1.001), norm=0.1).equal


def test_the_first_that_fits_holds_and_the_rest_is_as_without(run: Run) -> None:
    a, b = run(x=X, y=X, z=X), run(x=X * 1.01, y=X * 1.01, z=X * 1.01)
    rules = {"tolerances": [{"match": "_x$", "norm": 0.1}, {"match": "_[xy]$", "norm": 0.001}]}
    found = tlcore.compare(a, b, rules=rules)
    assert statuses(found) == {"x": "close", "y": "different", "z": "different"}
    assert [each.rule for each in found.results] == ["_x$", "_[xy]$", None]
    # The same bytes under several names are measured once, and judged by each name's rule.
    assert [each.reason is None for each in found.results] == [True, False, True]


class Layers(nn.Module):
    def __init__(self, error: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, layer in enumerate(self.layers):
            # Kept apart, so that identical bytes do not settle it.
            x = layer(x * (1 + self.error) + at)
        return x


def test_tolerances_grow_with_depth(tmp_path: Path) -> None:
    def capture(error: float) -> str:
        model = Layers(error)
        with tlcore.capture(model, output_dir=str(tmp_path), module_call_match="layers") as captured:
            model(X)
        return captured.url

    a, b = capture(0.0), capture(0.001)
    growing = {"match": r"layers\.\d/outputs", "norm": 0.0012, "grow": {"depth": 1.0}}
    flat = {**growing, "grow": {"position": 1.0, "step": 1.0}}
    leave_out = ["inputs"]
    assert tlcore.compare(a, b, rules={"tolerances": [growing], "leave_out": leave_out}).equal
    first = tlcore.compare(a, b, rules={"tolerances": [flat], "leave_out": leave_out}).first_divergence
    assert first is not None and first.module == "layers.1"


def test_tolerances_grow_with_position_and_step(tmp_path: Path) -> None:
    def capture(error: float) -> str:
        model = nn.Sequential(nn.Identity())
        with tlcore.capture(
            model, output_dir=str(tmp_path), log_step_ids=[], module_call_match="0", log_token_ids=False
        ) as captured:
            for at in range(3):
                with captured.step(rows=[f"request {at}"]):
                    model(X.view(1, 4, 6)[:, : 2**at] * (1 + error * (1 + at)))
        return captured.url

    a, b = capture(0.0), capture(0.001)
    for growth, norm in (("step", 0.0012), ("position", 0.0012)):
        tolerance = {"match": "^0/", "norm": norm, "grow": {growth: 1.0}}
        found = tlcore.compare(a, b, rules={"tolerances": [tolerance]})
        assert found.equal, str(found)
        assert not tlcore.compare(a, b, rules={"tolerances": [{**tolerance, "grow": {}}]}).equal


def test_what_must_be_there_and_what_is_left_out(run: Run) -> None:
    a, b = run(x=X, y=X), run(x=X, z=X)
    assert not tlcore.compare(a, b).equal
    found = tlcore.compare(a, b, rules={"leave_out": ["_[yz]$"]})
    assert found.equal and any("were not compared, as the rules say" in note for note in found.notes)
    assert tlcore.compare(a, b, ignore_missing=True, rules={"require": ["_x$"]}).equal
    found = tlcore.compare(a, b, ignore_missing=True, rules={"require": ["_y$"]})
    assert {each.reason for each in found.results if not each.agrees} == {
        "only A has it",
        "the rules require a tensor that fits '_y$', and none was compared",
    }


def test_a_rule_and_the_noise_must_both_be_exceeded(run: Run) -> None:
    a, b, c = run(x=X), run(x=X * 1.01), run(x=X * 1.0001)
    rules = {"tolerances": [{"match": "x", "norm": 0.02}]}
    assert not tlcore.compare(a, b, noise=c).equal
    assert tlcore.compare(a, b, noise=c, rules=rules).equal
    rules["tolerances"][0]["norm"] = 0.001
    assert not tlcore.compare(a, b, noise=c, rules=rules).equal
    assert tlcore.compare(a, b, noise=run(x=X * 1.005), rules=rules).equal


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ('{"tolerance": []}', r'\$\.tolerance: unknown key. Did you mean "tolerances"\?'),
        ('{"tolerances": [{"norm": 1}]}', r'\$\.tolerances\[0\]: the key "match" is missing'),
        ('{"tolerances": [{"match": "x"}]}', r"\$\.tolerances\[0\]: no tolerance is given"),
        ('{"tolerances": [{"match": "x", "grow": {}}]}', r"\$\.tolerances\[0\]: no tolerance is given"),
        (
            '{"tolerances": [{"match": "x", "norm": -1}]}',
            r"\$\.tolerances\[0\]\.norm: -1 is not allowed; allowed: a number >= 0",
        ),
        ('{"tolerances": [{"match": "(", "norm": 1}]}', r"\$\.tolerances\[0\]\.match: '\(' is not a regular"),
        ('{"leave_out": ["ok", "["]}', r"\$\.leave_out\[1\]: '\[' is not a regular expression"),
        ('{"require": "x"}', r'\$\.require: "x" is not allowed; allowed: an array'),
        ("[1]", r"\$: the rules must be a JSON object"),
        ('{"require": ', r"\$"),
    ],
    ids=range(10),
)
def test_a_mistake_is_an_error_that_names_the_place(
    rules: str, message: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, file = run(x=X), tmp_path / "rules.json"
    file.write_text(rules)
    with pytest.raises(ConfigError, match=f"rules.json: {message}"):
        tlcore.compare(a, a, rules=file)
    assert main(["compare", a, a, "--rules", str(file)]) == 2
    assert f"{file}: " in capsys.readouterr().err


def test_the_command_takes_rules(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, file = run(x=X), run(x=X * 1.01), tmp_path / "rules.json"
    file.write_text(json.dumps({"tolerances": [{"match": "x", "norm": 0.1}]}))
    assert main(["compare", a, b]) == 1
    assert main(["compare", a, b, "--rules", str(file)]) == 0
    file.write_text(json.dumps({"tolerances": [{"match": "x", "norm": 0.001}]}))
    assert main(["compare", a, b, "--rules", str(file)]) == 1
    assert "rule 'x': norm 0.0099009" in capsys.readouterr().out
    assert main(["compare", a, b, "--rules", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read: No such file" in capsys.readouterr().err
