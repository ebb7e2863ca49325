"""What reading other tools' dumps in place costs, against what loads them otherwise."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

import tlcore
from tests.backends.foreign import (
    test_hidden_states,
    test_msprobe,
    test_nxd,
    test_plain,
    test_polygraphy,
    test_sglang,
    test_transformer_engine,
)
from tests.backends.foreign.conformance import ForeignConformance

from .rows import Row, Scale, at_most
from .timing import interleaved, ratio

_WIDTH = 576


def _torch_files(directory: Path) -> list[Any]:
    return [torch.load(each, weights_only=True) for each in sorted(directory.rglob("*.pt"))]


def _safetensors(directory: Path) -> list[Any]:
    # `load_file` would only map the file, and read nothing.
    return [load(each.read_bytes()) for each in directory.glob("*.safetensors")]


def _numpy(directory: Path) -> list[Any]:
    with np.load(directory / "any.npz") as archive:
        return [torch.from_numpy(archive[name]) for name in archive.files]


def _polygraphy(directory: Path) -> list[Any]:
    """What its own loader does, without what it needs besides."""
    document = json.loads((directory / "results.json").read_text())
    outputs = document["lst"][0][1][0]["outputs"].values()
    return [np.load(io.BytesIO(base64.b64decode(each["values"]["array"]))) for each in outputs]


_TOOLS: dict[str, tuple[type[ForeignConformance], Callable[[Path], list[Any]]]] = {
    "plain .safetensors": (test_plain.TestSafetensors, _safetensors),
    "plain .pt": (test_plain.TestTorch, _torch_files),
    "plain .npz": (test_plain.TestNumpy, _numpy),
    "a .pt for each tensor": (test_plain.TestOneTensorAFile, _torch_files),
    "vLLM's hidden states": (test_hidden_states.TestHiddenStates, _safetensors),
    "msprobe": (test_msprobe.TestMsprobe, _torch_files),
    "Neuron": (test_nxd.TestNeuronCapture, _torch_files),
    "Polygraphy": (test_polygraphy.TestPolygraphy, _polygraphy),
    "SGLang's folder": (test_sglang.TestFolder, _torch_files),
    "SGLang's dumper": (test_sglang.TestDumper, _torch_files),
    "TransformerEngine": (test_transformer_engine.TestTransformerEngine, _torch_files),
}


def table(scale: Scale) -> list[Row]:
    """For each tool's dump: all of its tensors read in place, against the loader, in seconds of CPU."""
    rows = []
    for count, length in ((4, 8),) if scale.tiny else ((64, 64), (32, 1024)):
        made = torch.Generator().manual_seed(1)
        tensors = {f"model.layers.{i}.mlp": torch.randn(length, _WIDTH, generator=made) for i in range(count)}
        for name, (writer, own) in _TOOLS.items():
            with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
                place = Path(directory)
                held = tensors
                if writer is test_hidden_states.TestHiddenStates:
                    held = {f"hidden_states.{i}": each for i, each in enumerate(tensors.values())}
                    test_hidden_states.TOKENS = torch.arange(length)
                path = writer().write(place, held)
                rows.append(_row(f"{name}, {count} x [{length}, {_WIDTH}]", path, place, own, scale))
    return rows


def _row(what: str, path: Path, place: Path, own: Callable[[Path], list[Any]], scale: Scale) -> Row:
    measures = {"in place": lambda: _spent(lambda: _read(path)), "own": lambda: _spent(lambda: own(place))}
    times = interleaved(measures, scale.repeats)
    detail = f"{median(times['own']) * 1e3:.3g} ms by the loader"
    return Row(f"{what}: in place / loader", ratio(times, "in place", "own"), at_most(1.2), "", detail)


def _spent(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def _read(path: Path) -> list[torch.Tensor]:
    run = tlcore.open_run(path)
    return [each.tensor(name) for each in map(run.step, run.steps) for name in each.names]
