"""What reading other tools' dumps in place costs, against what loads them otherwise.

Both fill memory that is new to the process, as whoever loads a dump once does. Left alone, the C library
gives freed memory back or keeps it, as it happens to lie, and one of two loaders then pays for the same pages
again and again: up to three times the time of the other one, whichever it is.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
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
    test_saelens,
    test_sglang,
    test_transformer_engine,
    test_transformers_debugger,
)
from tests.backends.foreign.conformance import ForeignConformance
from tests.backends.foreign.tools import installed, write

from .rows import Row, Scale, at_most
from .timing import Times, interleaved, ratio

_WIDTH = 576
# Of the C library's `mallopt`: from where on memory is asked for by itself, and from where on given back.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def keep_memory() -> None:
    """Let the C library keep what is freed until it is asked for it; others than GNU's do as they like."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _give_memory_back() -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


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


def _debugger(directory: Path) -> list[Any]:
    """The files that the tree names, then those that it leaves out: there is no loader but who follows it.

    Without the tree nobody knows of which call a file is, nor whether an earlier forward has left it there.
    """
    tree = next(directory.glob("*_debug_tree_FULL_TENSORS.json"))
    names = dict.fromkeys(_files_in(json.loads(tree.read_text())))
    names |= dict.fromkeys(sorted(each.name for each in directory.glob("*.safetensors")))
    return [load((directory / name).read_bytes())["data"] for name in names]


def _files_in(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _files_in(each)
    elif isinstance(node, dict):
        value = node.get("value")
        if isinstance(value, str):
            yield value.removeprefix("./")
        for each in node.values():
            yield from _files_in(each)


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
    "transformers' debugger": (test_transformers_debugger.TestTransformersDebugger, _debugger),
}


def table(scale: Scale) -> list[Row]:
    """For each tool's dump: all of its tensors read in place, against the loader, in seconds of CPU."""
    if not scale.tiny:
        # For good, which is nothing for a test's process.
        keep_memory()
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
                path = writer().write(place, held)
                rows.append(_row(f"{name}, {count} x [{length}, {_WIDTH}]", path, place, own, scale))
        if not scale.tiny:
            rows.append(_saelens(count, length, scale))
    return rows


# SAELens asks its data set for rows by number, as tensors; both are timed where its packages are.
_SAELENS = """
import json, sys, time, torch, tlcore, datasets
from tests.benchmarks.foreign import _read, _spent, keep_memory
from tests.benchmarks.timing import interleaved
def own():
    data = datasets.load_from_disk(sys.argv[1]).with_format("torch")
    return [data[i : i + 1] for i in range(len(data))]
torch.set_num_threads(1)
keep_memory()
measures = {"in place": lambda: _spent(lambda: _read(sys.argv[1])), "own": lambda: _spent(own)}
print(json.dumps(interleaved(measures, int(sys.argv[2]))))
"""


def _saelens(count: int, length: int, scale: Scale) -> Row:
    """A data set whose rows are as large as the other tools' tensors."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
        path = Path(directory) / "data"
        made = torch.Generator().manual_seed(1)
        held = {
            "hook": torch.randn(count, length, _WIDTH, generator=made),
            "token_ids": torch.zeros(count, length, dtype=torch.int32),
        }
        test_saelens._dataset(path, held, ["hook"])
        package = installed("saelens", *test_saelens.PACKAGES)
        times = json.loads(write(package, _SAELENS, str(path), str(scale.repeats)).splitlines()[-1])
    return _measured(f"SAELens, {count} x [{length}, {_WIDTH}]", times)


def _row(what: str, path: Path, place: Path, own: Callable[[Path], list[Any]], scale: Scale) -> Row:
    measures = {"in place": lambda: _spent(lambda: _read(path)), "own": lambda: _spent(lambda: own(place))}
    return _measured(what, interleaved(measures, scale.repeats))


def _measured(what: str, times: Times) -> Row:
    detail = f"{median(times['own']) * 1e3:.3g} ms by the loader"
    return Row(f"{what}: in place / loader", ratio(times, "in place", "own"), at_most(1.2), "", detail)


def _spent(call: Callable[[], object]) -> float:
    _give_memory_back()
    begin = time.process_time()
    call()
    return time.process_time() - begin


def _read(path: Path) -> list[torch.Tensor]:
    run = tlcore.open_run(path)
    return [each.tensor(name) for each in map(run.step, run.steps) for name in each.names]
