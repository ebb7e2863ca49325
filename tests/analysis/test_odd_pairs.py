"""Pairs of runs that are easily compared wrongly, each with its verdict and the words for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.waiting import wait_until
from tlcore.analysis.report import page
from tlcore.analysis.report.text import rows, verdict
from tlcore.errors import ReadError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")
FP8, FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2
BIG = 2**53
Values = Any
Capture = Callable[..., str]


class Says(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Model(nn.Module):
    """Calls a module for each value, once for each that is in a list."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values
        for name in values:
            self.add_module(name, Says())

    def forward(self) -> None:
        for name, given in self.values.items():
            for each in given if isinstance(given, list) else [given]:
                self.get_submodule(name)(each)


@pytest.fixture
def run(tmp_path: Path) -> Capture:
    return partial(captured, tmp_path)


def captured(out: Path, values: Values, steps: int = 1, **keys: Any) -> str:
    model = Model(values if isinstance(values, dict) else {"one": values})
    with tlcore.capture(model, output_dir=str(out), log_step_ids=[], **keys) as capture, torch.no_grad():
        for _ in range(steps):
            model()
    return capture.url


def told(found: tlcore.Comparison) -> str:
    return "\n".join([*verdict(found), *(" ".join(cells) for cells in rows(found.results))])


def with_nan(payload: int = 0) -> torch.Tensor:
    values = X.clone()
    values[1, 2] = NAN
    values.view(torch.int32)[1, 2] |= payload
    return values


def f64(*values: complex) -> torch.Tensor:
    return torch.tensor(values)


PAIRS: dict[str, tuple[torch.Tensor, torch.Tensor, str, str]] = {
    "float32-bfloat16": (X, X.bfloat16(), "close", "float32 is held against bfloat16 by the norms"),
    "float32-float64": (X, X.double(), "close", ""),
    "int-float": (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), "close", "int64 against float32"),
    "other-strides": (X, X.T.contiguous().T, "bitwise", "the runs agree"),
    "transposed": (X[:, :4], X[:, :4].T, "different", "largest difference: at ["),
    "nan-nan": (with_nan(), with_nan(), "bitwise", "the runs agree"),
    "nan-other-nan": (with_nan(), with_nan(payload=1), "close", "the runs agree"),
    "nan-number": (with_nan(), X, "different", "at [1, 2], nan against"),
    "inf-minus-inf": (f64(INF, 1.0), f64(-INF, 1.0), "different", "at [0], inf against -inf"),
    "zeros": (f64(0.0, 1.0), f64(-0.0, 1.0), "close", "first difference in any bit"),
    "subnormals": (f64(1e-40), f64(2e-40), "close", "first difference in any bit"),
    "large-integers": (
        torch.tensor([1, BIG]),
        torch.tensor([1, BIG + 1]),
        "different",
        f"at [1], {BIG} against {BIG + 1}",
    ),
    "nearly-equal": (f64(100.0), f64(100.0002), "different", "at [0], 100 against 100.000198"),
    "bytes": (
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.tensor([255, 255], dtype=torch.uint8),
        "different",
        "at [0], 0 against 255",
    ),
    "bools": (torch.tensor([True, False]), torch.tensor([True, True]), "different", "at [1], 0 against 1"),
    "complex": (f64(1 + 1j, 2), f64(1 + 1j, 2 + 1e-3j), "different", "2 against 2.00000025 in magnitude"),
    "float8-same": (X.to(FP8), X.to(FP8), "bitwise", "the runs agree"),
    "float8-apart": (X.to(FP8), (X * 1.3).to(FP8), "different", "largest difference"),
    "float8-float32": (X.to(FP8), X, "close", "float8_e4m3fn is held against float32"),
    "float8-float32-apart": (X.to(FP8), X * 1.5, "different", "rounded to the coarser dtype"),
    "float8-kinds": (X.to(FP8), X.to(FP8_WIDE), "close", ""),
    "float8-nan": (with_nan().to(FP8), X.bfloat16(), "different", "nan against"),
    "empty": (torch.empty(0, 4), torch.empty(0, 4), "bitwise", "the runs agree"),
    "empty-one": (torch.empty(0, 4), torch.ones(1, 4), "different", "shapes (0, 4) and (1, 4) differ"),
    "scalars": (torch.tensor(1.0), torch.tensor(1.5), "different", "at [], 1 against 1.5"),
    "scalar-vector": (torch.tensor(1.0), torch.tensor([1.0]), "different", "shapes () and (1,) differ"),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_two_tensors(name: str, backend: str, run: Capture) -> None:
    a, b, status, words = PAIRS[name]
    found = tlcore.compare(run(a, backend=backend), run(b, backend=backend), deep=True)
    outputs = [each for each in found.results if each.direction == "outputs"]
    assert [each.status for each in outputs] == [status], told(found)
    assert words in told(found)
    assert found.equal == (status != "different")


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, FP8, FP8_WIDE),
]


def test_any_two_dtypes(run: Capture) -> None:
    """Each beside each other one, with and without noise and rules, in every report."""
    whole = torch.tensor([[0.0, 1.0], [1.0, 1.0]])

    pairs = {f"{a}-{b}".replace("torch.", ""): (a, b) for a in DTYPES for b in DTYPES}

    def made(side: int, factor: float = 1.0) -> str:
        values = {name: (whole * factor).to(pair[side]) for name, pair in pairs.items()}
        return run(values, backend="safetensors")

    a, b, other = made(0), made(1), made(1, factor=4.0)
    same = tlcore.compare(a, b)
    assert same.equal and len(same.results) == 2 * len(pairs), told(same)
    found = tlcore.compare(a, other)
    differing = {each.module for each in found.results if each.status == "different"}
    # A 4 is no other bool than a 1.
    assert differing == {name for name in pairs if not name.endswith("-bool")}
    assert tlcore.compare(a, other, noise=made(1, factor=4.0)).equal
    rules = {"tolerances": [{"match": ".", "norm": 0.1, "cosine": 0.9, "ulp": 4}]}
    assert not tlcore.compare(a, other, rules=rules).equal
    assert found.to_json() and page(found, None)


def test_modules_that_only_one_run_has(run: Capture) -> None:
    a, b = run({"one": X, "two": X}), run({"one": X, "zwei": X})
    found = tlcore.compare(a, b)
    assert not found.equal and found.first_divergence is None
    assert "what both runs have agrees, but tensors are missing" in told(found)
    assert {(each.module, each.reason) for each in found.results if each.status == "missing"} == {
        ("two", "only A has it"),
        ("zwei", "only B has it"),
    }
    assert tlcore.compare(a, b, maps="two=zwei").equal


def test_calls_that_only_one_run_has_or_in_another_order(run: Capture) -> None:
    a, longer, other = run({"one": [X, X + 1]}), run({"one": [X, X + 1, X]}), run({"one": [X + 1, X]})
    found = tlcore.compare(a, longer)
    assert [(each.module, each.call) for each in found.results if each.status == "missing"] == [
        ("one", 2)
    ] * 2
    first = tlcore.compare(a, other).first_divergence
    assert first is not None and (first.module, first.call, first.direction) == ("one", 0, "inputs")
    assert "comes in from outside" in str(first) or "given to it from outside" in str(first)


def test_other_numbers_of_steps(run: Capture) -> None:
    a, b = run(X, steps=2), run(X, steps=3)
    found = tlcore.compare(a, b)
    assert {each.step for each in found.results if each.status == "missing"} == {2} and not found.equal
    found = tlcore.compare(a, b, ignore_missing=True)
    assert found.equal and "only one run has were left out" in told(found)


def test_a_run_that_is_still_written(run: Capture, tmp_path: Path) -> None:
    a, model = run(X, steps=2), Model({"one": X})
    with tlcore.capture(model, output_dir=str(tmp_path / "open"), log_step_ids=[]), torch.no_grad():
        model()
        (directory,) = (tmp_path / "open").iterdir()
        wait_until(lambda: tlcore.open_run(directory).steps == [0], "the first step")
        found = tlcore.compare(a, directory)
    assert not found.equal and found.first_divergence is None
    assert {each.step for each in found.results if each.status == "missing"} == {1}
    assert "not every run was closed (A is complete, B is incomplete)" in told(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_run_that_was_stored_in_another_dtype(dtype: str, run: Capture) -> None:
    found = tlcore.compare(run(X), run(X, store_dtype=dtype))
    assert found.equal
    assert f"what store_dtype rounded away: B was stored as {dtype}, and computed in float32" in told(found)
    found = tlcore.compare(run(X), run(X * 1.5, store_dtype=dtype))
    assert not found.equal and "the runs differ in dtype" not in told(found)


@pytest.mark.parametrize(
    ("kind", "reason"), [("stats", "statistics only"), ("channels", "channel statistics only")]
)
def test_a_run_of_statistics_alone(kind: str, reason: str, run: Capture) -> None:
    found = tlcore.compare(run(X), run(X, capture=kind))
    assert not found.equal and "nothing could be compared" in told(found)
    assert {each.reason for each in found.results} == {f"only A has it; B did not store it: {reason}"}
    with pytest.raises(ReadError, match=r"no tensor to compare .*statistics"):
        tlcore.compare(run(X, capture=kind), run(X, capture=kind))


def test_a_run_of_last_rows_alone(tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.embed(input_ids)
            return found

    model = Text()

    def run(**keys: Any) -> str:
        with tlcore.capture(model, output_dir=str(tmp_path), **keys) as capture, torch.no_grad():
            model(torch.tensor([[1, 2, 3], [4, 5, 6]]), attention_mask=torch.ones(2, 3, dtype=torch.long))
        return capture.url

    found = tlcore.compare(run(), run(rows="last"))
    assert not found.equal and found.first_divergence is None
    assert "B has chosen rows alone (rows: last)" in told(found)
    reasons = {each.reason for each in found.results if each.module == "embed" and each.status == "missing"}
    assert reasons == {"only A has its positions 0 to 1"}
    assert tlcore.compare(run(), run(rows="last"), ignore_missing=True).equal
    for keys, shown in (
        ({"rows": {"from": 1}}, 'rows: {"from": 1}'),
        ({"request_ids": ["^1$"]}, 'request_ids: ["^1$"]'),
    ):
        assert f"A has chosen rows alone ({shown})" in told(tlcore.compare(run(**keys), run()))
        both = tlcore.compare(run(**keys), run(**keys))
        assert both.equal and f"A and B have chosen rows alone ({shown})" in told(both)
