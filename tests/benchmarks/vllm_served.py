"""Decode steps of a vLLM engine as it starts by itself: its worker a process of its own, bound to processors.

``python -m tests.benchmarks.vllm_served SCALE`` prints the times as one JSON line.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models import smollm2

from .rows import SCALES, Scale
from .subprocesses import print_report
from .timing import Times, interleaved
from .vllm_hooks import no_hooks, noop_hooks


class Served:
    """The engine, and the seconds of its first decode steps and of later ones, round by round."""

    def __init__(self, directory: Path, scale: Scale) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=str(smollm2()), enforce_eager=True, max_model_len=512, enable_prefix_caching=False
        )
        self._directory, self._scale = directory, scale
        self._requests = 0
        self.first: Times = {}

    def plain(self, name: str = "plain") -> float:
        """Mean seconds of a later step; that of the first ones is noted."""
        steps = self._steps()[1:]
        count = self._scale.decode_steps
        self.first.setdefault(name, []).append(sum(steps[:count]) / count)
        return sum(steps[count:]) / len(steps[count:])

    def noop(self) -> float:
        """With hooks in Python on every module."""
        self._llm.apply_model(noop_hooks)
        try:
            return self.plain("no-op hooks")
        finally:
            self._llm.apply_model(no_hooks)

    def captured(self) -> float:
        """Every step captured, all modules."""
        from tlcore.adapters.vllm.frontend.attach import attach

        keys: dict[str, Any] = {"output_dir": str(self._directory), "log_step_ids": []}
        attached = attach(self._llm, backend="safetensors", **keys)
        seconds = self.plain("safetensors")
        counts = attached.detach().ledger
        # vLLM gives its head to the logits processor: a module among the arguments is counted, never stored.
        if counts.stored + counts.reasons["skipped: module"] != counts.captured or not counts.stored:
            raise RuntimeError(f"not everything was stored: {counts.to_json()}")
        return seconds

    def _steps(self) -> list[float]:
        from vllm import SamplingParams

        engine: Any = self._llm.llm_engine
        sampling = SamplingParams(temperature=0.0, max_tokens=self._tokens, ignore_eos=True)
        for row in range(self._scale.requests):
            prompt = [17 + 31 * row + column for column in range(8)]
            engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)
            self._requests += 1
        seconds = []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    @property
    def _tokens(self) -> int:
        """As many later steps as twice the first ones, and the prefill's token."""
        return 3 * self._scale.decode_steps + 1


def main(scale: Scale) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        served = Served(Path(name), scale)
        measures: dict[str, Callable[[], float]] = {
            "plain": served.plain,
            "again": lambda: served.plain("again"),
            "no-op hooks": served.noop,
            "safetensors": served.captured,
        }
        later = interleaved(measures, scale.repeats)
    first = {name: times[-scale.repeats :] for name, times in served.first.items()}
    print_report({"first": first, "later": later, "steps": scale.decode_steps})


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Functions travel to the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    main(SCALES[sys.argv[1]])
