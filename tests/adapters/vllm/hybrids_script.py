"""Captures requests in one engine of a model of `hybrids`, all of them and one, and prints a JSON line.

``python hybrids_script.py OUTPUT_DIR KIND``
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.helpers import say_and_end
from tests.adapters.vllm.hybrids import VOCABULARY, write_model

PROMPTS, ANSWERS = (5, 31, 12, 3, 18, 9), (14, 10, 8, 16, 3, 11)
CHOSEN = 1


def main(output_dir: str, kind: str) -> dict[str, Any]:
    """Answers without capture, and runs of the same requests in batches of prompts and answers."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm

    model = Path(output_dir) / "model"
    write_model(kind, model)
    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
    )
    chance = random.Random(5)
    prompts = [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in PROMPTS]
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in ANSWERS
    ]

    def generate() -> list[Any]:
        return list(llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False))

    report: dict[str, Any] = {"model": str(model)}
    report["plain"] = [list(output.outputs[0].token_ids) for output in generate()]
    for name, keys in (("all", {}), ("one", {"request_ids": f"^{2 * len(prompts) + CHOSEN}-"})):
        with tlcore.vllm.attach(
            llm, output_dir=output_dir, log_step_ids=[], backend="safetensors", **keys
        ) as attached:
            outputs = generate()
        report[name] = {
            "url": attached.url,
            "ids": [output.request_id for output in outputs],
            "answers": [list(output.outputs[0].token_ids) for output in outputs],
        }
    return {**report, "prompts": prompts}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    say_and_end(main(*sys.argv[1:]))
