"""An in-process vLLM engine (eager, CPU) whose steps are timed with and without capture.

``python -m tests.benchmarks.vllm_engine prefill|decode|layer SCALE`` prints the times as one JSON line.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.adapters.vllm.helpers import all_stored
from tests.models import smollm2
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

from .capturing import Memcpy
from .rows import SCALES, Scale
from .subprocesses import print_report
from .timing import interleaved
from .vllm_hooks import hooked_all
from .workload import OnTensor, tensors_in

# These take so long that a few steps must do.
_SAVED_STEPS = 4
_PT_STEPS = 16
# Halfway through the model.
_LAYER = "model.layers.15"


class Engine:
    """The engine, and the model runner in it as stock vLLM made it."""

    def __init__(self, llm: Any = None) -> None:
        from vllm import LLM

        options = {"enforce_eager": True, "max_model_len": 512, "enable_prefix_caching": False}
        self._engine: Any = (llm or LLM(model=str(smollm2()), **options)).llm_engine
        worker = self._engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.runner: Any = worker.model_runner
        self.model: Any = self.runner.get_model()
        self._requests = 0

    def steps(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[float]:
        """Seconds of each engine step until every prompt has ``tokens`` new tokens."""
        from vllm import SamplingParams

        for prompt in prompts:
            sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            self._engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, sampling)
            self._requests += 1
        seconds = []
        while self._engine.has_unfinished_requests():
            begin = time.perf_counter()
            self._engine.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    @contextmanager
    def captured(self, session: Session) -> Iterator[None]:
        """Every step is one of the session's, as in a worker with tlcore configured; none is afterwards."""
        StepWrapper(session, self.runner)
        try:
            yield
        finally:
            for name in ("execute_model", "sample_tokens", "pool"):
                self.runner.__dict__.pop(name, None)
            session.step_aside()

    def session(self, directory: Path, backend: str, modules: str | None = None) -> Session:
        """A session attached to the model that captures all steps, of all modules or of those that match."""
        keys: dict[str, Any] = {"output_dir": str(directory), "backend": backend, "log_step_ids": []}
        config = load_config(module_call_match=modules, **keys)
        session = Session(config, new_run(config))
        session.attach(self.model)
        return session


def decode(engine: Engine, directory: Path, scale: Scale) -> dict[str, Any]:
    """Mean seconds of a decode step, over all steps of a round; the prefill before them is left out."""
    prompts = [[17 + 31 * row + column for column in range(8)] for row in range(scale.requests)]
    after: list[float] = []

    def mean(tokens: int = scale.decode_steps + 1) -> float:
        steps = engine.steps(prompts, tokens)[1:]
        return sum(steps) / len(steps)

    def captured(backend: str, tokens: int = scale.decode_steps + 1) -> float:
        session = engine.session(directory, backend)
        with engine.captured(session):
            seconds = mean(tokens)
        begin = time.perf_counter()
        session.flush()
        after.append(time.perf_counter() - begin)
        _close(session)
        return seconds

    def noop() -> float:
        with hooked_all(engine.model, lambda name, direction, index, tensor: None):
            return mean()

    def saving() -> float:
        with hooked_all(engine.model, _saver(directory)):
            return mean(_SAVED_STEPS + 1)

    measures = {
        "plain": mean,
        "no-op hooks": noop,
        "safetensors": lambda: captured("safetensors"),
        "pt": lambda: captured("pt", min(_PT_STEPS, scale.decode_steps) + 1),
        "synchronous torch.save": saving,
    }
    return {"times": interleaved(measures, scale.repeats), "flush_s": after}


def prefill(engine: Engine, directory: Path, scale: Scale) -> dict[str, Any]:
    """Seconds of the step that prefills one prompt."""
    prompts = [[column % 499 + 1 for column in range(scale.prompt_tokens)]]
    tensors: list[torch.Tensor] = []
    with hooked_all(engine.model, lambda name, direction, index, tensor: tensors.append(tensor.clone())):
        engine.steps(prompts, 1)
    memcpy = Memcpy(tensors)
    sessions = {name: engine.session(directory, name) for name in ("safetensors", "pt")}

    def plain() -> float:
        return sum(engine.steps(prompts, 1))

    def captured(name: str) -> float:
        with engine.captured(sessions[name]):
            seconds = plain()
        sessions[name].flush()
        return seconds

    def saving() -> float:
        with hooked_all(engine.model, _saver(directory)):
            return plain()

    measures: dict[str, Callable[[], float]] = {
        "plain": plain,
        "memcpy": memcpy.seconds,
        "safetensors": lambda: captured("safetensors"),
        "pt": lambda: captured("pt"),
        "torch.save": saving,
    }
    times = interleaved(measures, scale.repeats)
    for session in sessions.values():
        _close(session)
    return {"times": times, "tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors)}


def layer(engine: Engine, directory: Path, scale: Scale) -> dict[str, Any]:
    """Seconds from the first step to the last of all prompts together, with one layer captured or without."""
    count, tokens = (4, 4) if scale.tiny else (64, 64)
    prompts = [[17 + 31 * row + column for column in range(tokens)] for row in range(count)]
    after: list[float] = []

    def plain() -> float:
        return sum(engine.steps(prompts, tokens))

    def captured() -> float:
        session = engine.session(directory, "safetensors", f"^{re.escape(_LAYER)}$")
        with engine.captured(session):
            seconds = plain()
        begin = time.perf_counter()
        session.flush()
        after.append(time.perf_counter() - begin)
        _close(session)
        return seconds

    def saving() -> float:
        with _hooked_alone(engine.model.get_submodule(_LAYER), _saver(directory)):
            return plain()

    measures = {"plain": plain, "again": plain, "captured": captured, "torch.save": saving}
    return {"times": interleaved(measures, scale.repeats), "flush_s": after}


@contextmanager
def _hooked_alone(module: nn.Module, on_tensor: OnTensor) -> Iterator[None]:
    """Plain hooks on one module."""

    def sees(direction: str, *values: Any) -> None:
        for index, tensor in enumerate(tensors_in(values)):
            on_tensor(_LAYER, direction, index, tensor)

    before = module.register_forward_pre_hook(
        lambda _, args, kwargs: sees("inputs", args, kwargs), with_kwargs=True
    )
    after = module.register_forward_hook(lambda _, args, output: sees("outputs", output))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _saver(directory: Path) -> OnTensor:
    folder = Path(tempfile.mkdtemp(dir=directory))

    def save(name: str, direction: str, index: int, tensor: torch.Tensor) -> None:
        torch.save(tensor.detach().cpu(), folder / f"{name}-{direction}-{index}-{time.monotonic_ns()}.pt")

    return save


def _close(session: Session) -> None:
    session.close()
    counts = session.ledger
    if not all_stored(counts):
        raise RuntimeError(f"not everything was stored: {counts.to_json()}")


def main(kind: str, scale: Scale) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        measure = {"prefill": prefill, "decode": decode, "layer": layer}[kind]
        report = measure(Engine(), Path(name), scale)
    report["torch_threads"] = torch.get_num_threads()
    print_report(report)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main(sys.argv[1], SCALES[sys.argv[2]])
