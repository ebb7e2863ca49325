"""Captures requests of a model of `of_transformers` in a compiled engine, with taps, and prints a JSON line.

``python of_transformers_script.py OUTPUT_DIR KIND``: the requests end one after the other, so that the last
ones are alone in their steps.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.helpers import say_and_end
from tests.adapters.vllm.of_transformers import VOCABULARY, write_model

PROMPTS, ANSWERS = (5, 21, 12), (4, 7, 10)
PADDED = 8


def main(output_dir: str, kind: str) -> dict[str, Any]:
    """What was asked and answered, and where the run lies."""
    from vllm import LLM, SamplingParams

    model, runs = Path(output_dir) / "model", Path(output_dir) / "runs"
    write_model(kind, model)
    llm = LLM(
        str(model),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        enable_prefix_caching=False,
        intermediate_log_config={
            "output_dir": str(runs), "log_step_ids": [], "backend": "safetensors", "compiled": "taps",
        },
    )  # fmt: skip
    _pad_steps(llm)
    chance = random.Random(5)
    prompts = [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in PROMPTS]
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in ANSWERS
    ]
    outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
    report: dict[str, Any] = {"model": str(model), "prompts": prompts}
    report["ids"] = [output.request_id for output in outputs]
    report["answers"] = [list(output.outputs[0].token_ids) for output in outputs]
    # The run ends with its engine.
    del llm
    gc.collect()
    (report["url"],) = map(str, runs.iterdir())
    return report


def _pad_steps(llm: Any) -> None:
    """Let each step have a multiple of `PADDED` rows, as steps do that run as a CUDA graph."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    dispatcher = runner.cudagraph_dispatcher
    original = dispatcher.dispatch

    def dispatch(num_tokens: int, **more: Any) -> Any:
        return original(num_tokens=-(-num_tokens // PADDED) * PADDED, **more)

    dispatcher.dispatch = dispatch


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    say_and_end(main(*sys.argv[1:]))
