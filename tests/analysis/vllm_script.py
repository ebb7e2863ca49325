"""Runs an in-process vLLM engine with capture: one prompt alone, then eight in a given order.

``python vllm_script.py MODEL OUTPUT_DIR ORDER MAX_NUM_SEQS``, where ORDER is a JSON array of eight places.
"""

from __future__ import annotations

import json
import os
import sys

from tests.adapters.vllm.engine_script import PROMPTS

ALONE = "The first three prime numbers are two, three and five. The next one is"
MODULES = [r"embed_tokens$", r"layers\.\d+$", r"layers\.(0|17)\.", r"model\.norm$"]

# With AMX a bfloat16 result depends on the batch's size, by more than its rounding.
DTYPE = "float32"


def main(model: str, output_dir: str, order: list[int], max_num_seqs: int) -> None:
    """Generate a few tokens greedily and capture all steps."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype=DTYPE,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=False,
        intermediate_log_config={
            "output_dir": output_dir,
            "log_step_ids": [],
            "module_call_match": MODULES,
        },
    )
    one = SamplingParams(temperature=0.0, max_tokens=1)
    llm.generate([ALONE], one, use_tqdm=False)
    few = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    llm.generate([PROMPTS[place] for place in order], few, use_tqdm=False)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
