"""Runs an engine of one or several ranks, attaches to it, and prints what came of it as one JSON line.

``python ranks_script.py OUTPUT_DIR KEYWORDS``, where KEYWORDS is a JSON object of arguments for ``LLM``.
Without a ``model`` it is the tiny one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = ["the quick brown fox jumps over", "the lazy dog", "brown fox"]
REPOSITORY = str(Path(__file__).parents[3])


def main(output_dir: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Capture a few requests with an attached capture, after one that is not captured."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm
    from tests.adapters.vllm.helpers import prepare_stages
    from tests.models import tiny_llama

    model = keywords.pop("model", None) or str(tiny_llama())
    llm = LLM(model, enforce_eager=True, max_model_len=256, enable_prefix_caching=False, **keywords)
    if keywords.get("pipeline_parallel_size", 1) > 1:
        prepare_stages(llm)
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    before = llm.generate(PROMPTS, sampling, use_tqdm=False)
    with tlcore.vllm.attach(llm, output_dir=output_dir, log_step_ids=[]) as attached:
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    tokens = [[list(each.outputs[0].token_ids) for each in some] for some in (before, outputs)]
    return {
        "url": attached.url,
        "unchanged": tokens[0] == tokens[1],
        "requests": [each.request_id for each in outputs],
        "prompt_lengths": [len(each.prompt_token_ids or ()) for each in outputs],
        "status": attached.status().to_json(),
    }


if __name__ == "__main__":
    sys.path.insert(0, REPOSITORY)
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1], json.loads(sys.argv[2])))}\n")
