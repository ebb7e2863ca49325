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
    """Capture one prompt: how several share the steps depends on when they arrive."""
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
    prompts: Any = [{"prompt_token_ids": [5, 6, 7, 8, 9, 10, 11, 20, 30, 40, 50]}]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=3), use_tqdm=False)
    return {"tokens": [list(each.outputs[0].token_ids) for each in outputs]}


if __name__ == "__main__":
    sys.path.insert(0, REPOSITORY)
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1], json.loads(sys.argv[2])))}\n")
