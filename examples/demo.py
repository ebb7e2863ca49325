"""Serve SmolLM2-135M with stock vLLM, capture its first step, and look at what was captured.

The model's checkpoint is prepared in the user's cache on the first run; `--model` takes another one.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm import LLM, SamplingParams

import tlcore
from tlcore.__main__ import main as tlcore_command
from tlcore.reader import Run, list_runs

PROMPT = "The capital of France is"
SHOWN_FILES = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Capture, then print the answer, the run's tree, and a layer's statistics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint's directory or name; SmolLM2-135M by default")
    parser.add_argument("--output-dir", default="/tmp/tlcore_demo", help="parent of the run directory")
    args = parser.parse_args(argv)

    answer = generate(args.model or default_model(), args.output_dir)
    print(f"\n{PROMPT!r} -> {answer!r}")

    path = list_runs(args.output_dir)[-1].path
    run = tlcore.open_run(path)
    print(f"\n{run.verify()} tensors captured and verified in {path}")
    print_tree(Path(path))
    layer = first_layer(run)
    commands = [
        ["ls", args.output_dir],
        ["ls", path, "--module", rf"^{re.escape(layer)}$"],
        ["show", path, layer_output(run, layer)],
    ]
    for command in commands:
        print(f"\n$ tlcore {shlex.join(command)}", flush=True)
        tlcore_command(command)


def default_model() -> str:
    """The SmolLM2-135M checkpoint that the tests use too."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.models import smollm2

    return str(smollm2())


def generate(model: str, output_dir: str) -> str:
    """Answer one prompt greedily while step 0 is captured; returns the completion."""
    # By default vLLM on CPU wants nearly all memory; a short prompt needs little.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    llm = LLM(
        model=model,
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.5,
        intermediate_log_config={"output_dir": output_dir, "log_step_ids": [0]},
    )
    outputs = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=8))
    text: str = outputs[0].outputs[0].text
    # The engine's process ends the run when it goes; what follows reads a complete one.
    llm.llm_engine.engine_core.shutdown()
    return text


def print_tree(run: Path) -> None:
    """Print the run's files, those nearest the top first, with the end left out."""
    files = [path for path in run.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (len(path.parts), path))
    print(f"{run.parent}/")
    for path in files[:SHOWN_FILES]:
        print(f"  {path.relative_to(run.parent)}")
    if len(files) > SHOWN_FILES:
        print(f"  ... and {len(files) - SHOWN_FILES} more files")


def first_layer(run: Run) -> str:
    """The call of the model's first decoder layer."""
    calls = run.step(run.steps[0]).calls
    return next(call for call in calls if call.endswith("layers.0"))


def layer_output(run: Run, layer: str) -> str:
    """The logical name of the layer's first output."""
    step = run.step(run.steps[0])
    return next(name for name in step.names if name.startswith(f"step_{step.number}/{layer}/outputs"))


if __name__ == "__main__":
    main()
