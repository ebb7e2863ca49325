"""Baselines: saved, held against, and reported as JUnit XML and Markdown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def capture(factor: float = 1.0, **keys: Any) -> str:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        with torch.no_grad():
            model.get_submodule("2").get_parameter("weight").mul_(factor)
        with tlcore.capture(model, output_dir=str(tmp_path / "dumps"), **keys) as captured:
            model(torch.randn(3, 8))
        return captured.url

    return capture


@pytest.fixture(params=["tensors", "statistics"])
def baseline(request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> Path:
    target = tmp_path / "repository" / ("base.json" if request.param == "statistics" else "base")
    assert main(["baseline", "save", run(), str(target), *(["--stats"] * target.name.endswith("json"))]) == 0
    return target


def test_the_same_again_passes_and_a_change_fails(
    baseline: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xml, summary = tmp_path / "report.xml", tmp_path / "summary.md"
    reports = ["--junit", str(xml), "--summary", str(summary)]
    assert main(["baseline", "check", str(baseline), run(), *reports]) == 0
    assert "the runs agree" in capsys.readouterr().out
    (suite,) = ElementTree.parse(xml).getroot()
    assert suite.attrib["failures"] == "0" and int(suite.attrib["tests"]) == 5
    assert main(["baseline", "check", str(baseline), run(1.01), *reports]) == 1
    assert "first divergence: 2, outputs of step 0; born here" in capsys.readouterr().out
    (suite,) = ElementTree.parse(xml).getroot()
    failed = {case.attrib["name"]: case[0] for case in suite if len(case)}
    assert suite.attrib["failures"] == "3" and set(failed) == {"verdict", "2", "_root"}
    assert failed["verdict"].attrib["message"].startswith("first divergence: 2, outputs")
    assert "module 2, direction outputs, status different" in (failed["2"].text or "")
    said = summary.read_text()
    assert said.count("# ") == 2 and "- the runs agree" in said and "- first divergence: 2" in said
    # Within a tolerance it passes again.
    assert main(["baseline", "check", str(baseline), run(1.01), "--rtol", "0.1", "--atol", "1"]) == 0


def test_what_is_new_or_gone_fails(baseline: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baseline", "check", str(baseline), run(module_call_match=["^[01]$"])]) == 1
    assert "only A has it" in capsys.readouterr().out


def test_a_baseline_is_replaced_only_where_that_is_said(
    baseline: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = ["--stats"] if baseline.is_file() else []
    changed = run(2.0)
    assert main(["baseline", "save", changed, str(baseline), *kind]) == 2
    assert "is there already; --replace" in capsys.readouterr().err
    other = [] if baseline.is_file() else ["--stats"]
    assert main(["baseline", "save", changed, str(baseline), "--replace", *other]) == 2
    assert main(["baseline", "save", changed, str(baseline), "--replace", *kind]) == 0
    assert main(["baseline", "check", str(baseline), run(2.0)]) == 0
    assert main(["baseline", "check", str(baseline), run()]) == 1


def test_statistics_of_a_capture_of_statistics_do(run: Run, tmp_path: Path) -> None:
    target = str(tmp_path / "base.json")
    assert main(["baseline", "save", run(capture="stats"), target, "--stats"]) == 0
    assert main(["baseline", "check", target, run(capture="stats")]) == 0
    # Hashes of another kind: then statistics tell.
    assert main(["baseline", "check", target, run()]) == 0
    assert main(["baseline", "check", target, run(1.01)]) == 1


def test_one_line_a_tensor(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "base.json"
    main(["baseline", "save", run(), str(target), "--stats"])
    lines = target.read_text().splitlines()
    assert len(lines) == 2 + len(tlcore.stats(run()).tensors)
    assert json.loads(lines[1].rstrip(","))["module"] == ""


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not valid JSON"),
        ('{"tlcore_baseline": 9, "tensors": []}', "a baseline of version 9"),
        ('{"tensors": []}', "not a baseline that tlcore saved"),
        ('{"tlcore_baseline": 1, "tensors": [{"step": 0}]}', "not a baseline that tlcore saved"),
    ],
)
def test_a_file_that_is_none_is_refused(
    content: str, problem: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "base.json"
    file.write_text(content)
    assert main(["baseline", "check", str(file), run()]) == 2
    assert problem in capsys.readouterr().err
    assert main(["baseline", "check", str(tmp_path / "none"), run()]) == 2
    assert "none: there is no such baseline" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["baseline", "check", str(tmp_path / "empty"), run()]) == 2
    assert "a baseline has one run in it, here are 0" in capsys.readouterr().err
    itself = run()
    assert main(["baseline", "check", itself, str(tmp_path / "empty")]) == 2
    assert f"{itself} is a run, no baseline; write" in capsys.readouterr().err


def test_what_statistics_cannot_do_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "base.json")
    main(["baseline", "save", run(), file, "--stats"])
    assert main(["baseline", "check", file, run(), "--noise", run()]) == 2
    assert "--noise: " in capsys.readouterr().err
    for kind in ("html", "model-explorer"):
        assert main(["baseline", "check", file, run(), "--format", kind]) == 2
        assert "statistics alone, which make no pictures" in capsys.readouterr().err


def test_names_that_xml_cannot_hold_are_replaced(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a\x01<&", nn.Identity())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.get_submodule("a\x01<&")(x)
            return found

    model = Odd()
    with tlcore.capture(model, output_dir=str(tmp_path)) as captured:
        model(torch.ones(2))
    target, xml = str(tmp_path / "base"), tmp_path / "report.xml"
    assert main(["baseline", "save", captured.url, target]) == 0
    assert main(["baseline", "check", target, captured.url, "--junit", str(xml)]) == 0
    assert any("a\ufffd<&" in case.attrib["name"] for case in ElementTree.parse(xml).getroot()[0])


@pytest.mark.slow
def test_the_workflow_runs_as_it_stands(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "baseline.yml").read_text()
    yaml = pytest.importorskip("yaml")
    steps = yaml.safe_load(text)["jobs"]["tensors"]["steps"]
    made = [line.lstrip("# ").split(" # ")[0] for line in text.splitlines() if line.startswith("#   ")]
    scripts = [step["run"] for step in steps if "run" in step and "pip install" not in step["run"]]
    assert len(made) == 3 and len(scripts) == 2
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }
    for script in [*made, *scripts]:
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "summary.md").read_text().count("the runs agree") == 2
    assert all(ElementTree.parse(tmp_path / each) for each in ("statistics.xml", "tensors.xml"))
