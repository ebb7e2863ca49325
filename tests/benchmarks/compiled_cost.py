"""A step that is not selected, in a compiled vLLM engine, against the same engine without tlcore.

``python -m tests.benchmarks.compiled_cost SCALE`` prints the times as one JSON line.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models import smollm2, tiny_llama

from .rows import SCALES, Row, Scale, at_most
from .subprocesses import print_report, report
from .timing import Times, interleaved, ratio

_NEVER = 10**9
_STEPS = 20
_WRAPPED = ("execute_model", "sample_tokens", "pool", "_determine_batch_execution_and_padding")


def table(scale: Scale) -> list[Row]:
    """The ratio of decode steps of eight requests, divided by that of two measurements without tlcore."""
    times: Times = report("compiled_cost", scale.name)
    configured, null = ratio(times, "configured", "plain"), ratio(times, "plain again", "plain")
    return [
        Row(
            "a step that is not selected, compiled vLLM / no tlcore, over the null ratio",
            configured / null,
            at_most(1.02),
            "",
            f"configured/plain {configured:.4f}, null (plain/plain) {null:.4f},"
            f" {times['plain'][0] * 1e3:.1f} ms a step",
        )
    ]


class _Engine:
    """A compiled in-process engine that can be had with and without what tlcore puts around its steps."""

    def __init__(self, scale: Scale, directory: str) -> None:
        import vllm.forward_context
        from vllm import LLM

        from .vllm_engine import Engine

        model = tiny_llama() if scale.tiny else smollm2()
        llm = LLM(model=str(model), max_model_len=512, enable_prefix_caching=False)
        self._engine = Engine(llm)
        self._contexts: Any = vllm.forward_context
        self._prompts = [[17 + 31 * row + column for column in range(8)] for row in range(scale.requests)]
        without = self._state()
        self._attach(llm, directory)
        self._states = {False: without, True: self._state()}

    def _attach(self, llm: Any, directory: str) -> None:
        import tlcore.vllm

        config = {"output_dir": directory, "log_step_ids": [_NEVER]}
        self._attached = tlcore.vllm.attach(llm, config)

    def _state(self) -> tuple[dict[str, Any], dict[Any, type], Callable[..., Any]]:
        own = vars(self._engine.runner)
        methods = {name: own[name] for name in _WRAPPED if name in own}
        classes = {module: type(module) for module in self._engine.model.modules()}
        return methods, classes, self._contexts.create_forward_context

    def fastest(self, configured: bool) -> float:
        """Seconds of the fastest of the decode steps.

        Whoever takes a core from a compiled step stops its threads at each kernel, which costs several times
        the step; a cost of every step is in the fastest one too.
        """
        methods, classes, create = self._states[configured]
        own = vars(self._engine.runner)
        for name in _WRAPPED:
            own.pop(name, None)
        own.update(methods)
        for module, cls in classes.items():
            module.__class__ = cls
        self._contexts.create_forward_context = create
        return min(self._engine.steps(self._prompts, _STEPS + 1)[1:])


def _measured(scale: Scale) -> Times:
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
        engine = _Engine(scale, str(Path(directory) / "runs"))
        measures = {
            "plain": lambda: engine.fastest(False),
            "configured": lambda: engine.fastest(True),
            "plain again": lambda: engine.fastest(False),
        }
        return interleaved(measures, scale.pairs)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    print_report(_measured(SCALES[sys.argv[1]]))
