"""A small run of each backend, and ways to spoil it as an attacker would."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore

TENSOR = "step_0/linear/outputs_cpu"
Edit = Callable[[Path], object]


class Leaf(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float) -> dict[str, Any]:
        return {"scaled": x * scale, "rest": (x, None, "text", float("nan"))}


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(self.leaf(x, scale=2.0)["scaled"])
        return out


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound run of each backend and layout, of the same values.

    Attacks on ``safetensors`` spoil shards, whose documents tell one step each; ``segments`` are fuzzed.
    """
    torch.manual_seed(0)
    model, x, found = Root(), torch.randn(2, 3), {}
    backends: dict[str, Any] = {
        "pt": "pt",
        "safetensors": {"name": "safetensors", "layout": 1},
        "segments": "safetensors",
    }
    for backend, written in backends.items():
        place = str(tmp_path_factory.mktemp(backend))
        with tlcore.capture(model, module_call_match=".", output_dir=place, backend=written) as captured:
            model(x)
        found[backend] = Path(captured.url)
    return found


@pytest.fixture(params=["pt", "safetensors"])
def hostile(request: pytest.FixtureRequest, sound: dict[str, Path], tmp_path: Path) -> Path:
    """A run to be spoilt, with a file beside it that nobody may read or change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("hunter2")
    return Path(shutil.copytree(sound[request.param], tmp_path / "runs" / "run"))


def edit(name: str, change: Callable[[Any], Any]) -> Edit:
    """Change a JSON document of a run."""

    def apply(run: Path) -> None:
        path = run / name
        document = json.loads(path.read_text())
        changed = change(document)
        path.unlink()
        path.write_text(json.dumps(document if changed is None else changed))

    return apply


def record(run: Any) -> Any:
    return next(each for each in run["records"] if each["name"] == TENSOR)


def in_run(**changes: Any) -> Edit:
    return edit("run.json", lambda document: document.update(changes))


def in_step(**changes: Any) -> Edit:
    return edit("step_0/step.json", lambda document: document.update(changes))


def in_record(**changes: Any) -> Edit:
    return edit("step_0/step.json", lambda document: record(document).update(changes))


def deep(levels: int, inner: Any = None) -> Any:
    for _ in range(levels):
        inner = [inner]
    return inner


def as_text(name: str, text: str) -> Edit:
    def apply(run: Path) -> None:
        (run / name).unlink()
        (run / name).write_text(text)

    return apply


def deep_structure(levels: int) -> Any:
    node: Any = {"type": "none"}
    for _ in range(levels):
        node = {"type": "list", "items": [node]}
    return node


def in_structure(node: Any) -> Edit:
    """Replace the structure of the first call's inputs, wherever the backend keeps it."""

    def apply(run: Path) -> None:
        own = run / "step_0/leaf/inputs.json"
        if own.exists():
            own.unlink()
            own.write_text(json.dumps(node))
        else:
            edit("step_0/step.json", lambda d: d["structures"].update({"leaf/inputs.json": node}))(run)

    return apply


def in_place_of(name: str, make: Callable[[Path], object]) -> Edit:
    """Remove a file of the run, if it is there, and put something else in its place."""

    def apply(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        make(run / name)

    return apply


def snapshot(directory: Path) -> dict[str, Any]:
    """All that lies outside the scratch directory, with its content."""
    found: dict[str, Any] = {}
    for root, directories, files in os.walk(directory):
        if "scratch" in directories:
            directories.remove("scratch")
        for file in files:
            path = Path(root, file)
            found[str(path)] = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[root] = sorted(directories)
    return found
