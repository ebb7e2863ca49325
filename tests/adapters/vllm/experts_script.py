"""Runs a mixture of experts on one or several ranks, and prints where it was captured as one JSON line.

``python experts_script.py OUTPUT_DIR KEYWORDS``, where KEYWORDS is a JSON object of arguments for ``LLM``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).parents[3])


def main(output_dir: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Capture a prompt, and then one of as many tokens as each token has experts.

    How several at once share the steps depends on when they arrive.
    """
    from vllm import LLM, SamplingParams

    from tests.models import tiny_moe

    llm = LLM(
        str(tiny_moe()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        worker_extension_cls="tests.adapters.vllm.expert_kernel.Extension",
        intermediate_log_config={"output_dir": output_dir, "log_step_ids": []},
        **keywords,
    )
    prompts: list[Any] = [[5, 6, 7, 8, 9, 10, 11, 20, 30, 40, 50], [5, 6]]
    sampling = SamplingParams(temperature=0.0, max_tokens=3)
    outputs = [
        output
        for prompt in prompts
        for output in llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    ]
    return {"tokens": [list(each.outputs[0].token_ids) for each in outputs]}


if __name__ == "__main__":
    sys.path.insert(0, REPOSITORY)
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1], json.loads(sys.argv[2])))}\n")
