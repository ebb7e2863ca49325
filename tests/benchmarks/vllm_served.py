"""Decode steps of a vLLM engine as it starts by itself: its worker a process of its own, bound to processors.

``python -m tests.benchmarks.vllm_served SCALE`` prints the times as one JSON line.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tests.adapters.vllm.helpers import all_stored
from tests.models import smollm2

from .rows import SCALES, Scale
from .subprocesses import print_report
from .timing import Times, interleaved
from .vllm_hooks import no_hooks, noop_hooks


class Request(NamedTuple):
    """When one comes, of how many tokens its prompt is, and how many it is given."""

    step: int
    prompt: int
    tokens: int


class Served:
    """The engine, and the seconds of its first decode steps and of later ones, round by round.

    ``busy`` has requests of ever other lengths come and go instead, and all steps count.
    """

    def __init__(self, directory: Path, scale: Scale) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=str(smollm2()), enforce_eager=True, max_model_len=512, enable_prefix_caching=False
        )
        self._directory, self._scale = directory, scale
        self._requests = count()
        self.first: Times = {}
        self.busy = False

    def plain(self, name: str = "plain") -> float:
        """Mean seconds of a later step; that of the first ones is noted."""
        if self.busy:
            steps = self._steps(self._coming_and_going())
            return sum(steps) / len(steps)
        steps = self._steps(self._alike())[1:]
        first = self._scale.decode_steps
        self.first.setdefault(name, []).append(sum(steps[:first]) / first)
        return sum(steps[first:]) / len(steps[first:])

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
        if not all_stored(counts):
            raise RuntimeError(f"not everything was stored: {counts.to_json()}")
        return seconds

    def _steps(self, requests: list[Request]) -> list[float]:
        from vllm import SamplingParams

        engine: Any = self._llm.llm_engine
        seconds: list[float] = []
        while requests or engine.has_unfinished_requests():
            while requests and (requests[0].step <= len(seconds) or not engine.has_unfinished_requests()):
                _, prompt, tokens = requests.pop(0)
                sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
                ids = [17 + 31 * (len(requests) % 7) + column for column in range(prompt)]
                engine.add_request(str(next(self._requests)), {"prompt_token_ids": ids}, sampling)
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _alike(self) -> list[Request]:
        """As many later steps as twice the first ones, and the prefill's token."""
        return [Request(0, 8, 3 * self._scale.decode_steps + 1)] * self._scale.requests

    def _coming_and_going(self) -> list[Request]:
        draw, step, requests = random.Random(1), 0, list[Request]()
        for _ in range(4 if self._scale.tiny else 30):
            step += draw.randint(0, 5)
            requests.append(Request(step, draw.randint(5, 60), draw.randint(10, 40)))
        return requests


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
        served.busy = True
        busy = interleaved(measures, scale.repeats)
    first = {name: times[-scale.repeats :] for name, times in served.first.items()}
    print_report({"first": first, "later": later, "busy": busy, "steps": scale.decode_steps})


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Functions travel to the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    main(SCALES[sys.argv[1]])
