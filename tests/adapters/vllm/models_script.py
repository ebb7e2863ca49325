"""Asks an in-process engine with and without capture, and prints what came of it as a JSON line.

``python models_script.py MODEL generate|embed|classify eager|compiled|transformers OUTPUT_DIR``, where
``transformers`` is its code, eager.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS = ["the quick brown fox jumps over", "the lazy dog"]
TOKENS = 4


def main(model: str, task: str, mode: str, output_dir: str) -> dict[str, Any]:
    """The answers without capture and with every step captured, and where the run lies."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm

    extra: dict[str, Any] = {} if task == "generate" else {"runner": "pooling"}
    if mode == "transformers":
        extra |= {"model_impl": "transformers", "dtype": "float32"}
    eager = mode != "compiled"
    llm = LLM(model, max_model_len=128, enable_prefix_caching=False, enforce_eager=eager, **extra)

    def ask() -> list[list[float]]:
        if task == "embed":
            return [list(each.outputs.embedding) for each in llm.embed(PROMPTS, use_tqdm=False)]
        if task == "classify":
            return [list(each.outputs.probs) for each in llm.classify(PROMPTS, use_tqdm=False)]
        sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        return [list(each.outputs[0].token_ids) for each in llm.generate(PROMPTS, sampling, use_tqdm=False)]

    plain = ask()
    with tlcore.vllm.attach(llm, {"output_dir": output_dir, "log_step_ids": []}) as attached:
        captured = ask()
    return {"plain": plain, "captured": captured, "after": ask(), "url": attached.url}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.stdout.write(f"REPORT {json.dumps(main(*sys.argv[1:]))}\n")
