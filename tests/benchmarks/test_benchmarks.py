"""The benchmark program itself, with a toy in the model's place: its figures mean nothing here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.benchmarks import __main__ as program
from tests.benchmarks import gpu
from tests.benchmarks.rows import SCALES, Row, at_least, at_most

_SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("compare_speed", "report", "operators", "long", "long_growth", "long_decode")
]


@pytest.mark.parametrize(
    "name",
    [
        "prefill",
        "breakdown",
        "unselected",
        "decode",
        "reading",
        "exporting",
        "dataset_memory",
        "foreign",
        *_SLOW,
    ],
)
def test_every_row_has_a_finite_ratio(name: str) -> None:
    rows = program.run(name, SCALES["tiny"])
    assert rows
    assert len({row.what for row in rows}) == len(rows)
    assert all(math.isfinite(row.measured) for row in rows), rows


def test_a_row_is_met_up_to_its_target() -> None:
    assert Row("a", 2.0, at_most(2.0)).met is True
    assert Row("a", 2.1, at_most(2.0)).met is False
    assert Row("a", 15.0, at_least(15)).met is True
    assert Row("a", 14.9, at_least(15)).met is False
    assert Row("a", 1.0).met is None


@pytest.mark.parametrize(("measured", "status"), [(1.4, 0), (1.6, 1)])
def test_the_program_prints_rows_and_writes_json(
    measured: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = Row("reading / reading plainly", measured, at_most(1.5), "times", "3 s / 2 s")
    monkeypatch.setattr(program, "run", lambda name, scale: [row])
    assert program.main(["prefill", "--quick", "--json", str(tmp_path / "rows.json")]) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["scale"] == "quick"
    assert written["tables"]["prefill"] == [row.to_json()]


def test_an_unknown_name_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["prefil"])
    assert "there are prefill" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_a_device_has_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "lines.json"
    keys = ["--device", "cpu", "--shapes", "toy", "--steps", "2", "--rounds", "1", "--json", str(written)]
    assert gpu.main(keys) in (0, 1)
    lines = json.loads(written.read_text())["lines"]
    assert {(line["what"], line["way"]) for line in lines} == {
        (f"toy, {step}", way)
        for step in ("prefill of 256 tokens", *(f"decode, batch {batch}" for batch in (1, 8, 32)))
        for way in gpu.ways(gpu._nothing(torch.device("cpu")), 1)
        if way != "nothing"
    }
    assert all(math.isfinite(line["slowdown"]) and line["slowdown"] > 0 for line in lines)
    assert "toy, decode, batch 32" in capsys.readouterr().out


def test_without_a_device_the_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
