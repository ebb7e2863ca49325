"""Generates with one vLLM release, captured or not, and prints a JSON line; uses nothing but its public API.

``python engine_script.py MODEL CONFIG``, where CONFIG is the JSON configuration or ``null``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPTS = ["the quick brown fox jumps over", "the lazy dog"]
TOKENS = 4


def main(model: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Generate greedily from all prompts."""
    import vllm

    extra = {} if config is None else {"intermediate_log_config": config}
    llm = vllm.LLM(model=model, enforce_eager=True, max_model_len=256, enable_prefix_caching=False, **extra)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return {
        "version": vllm.__version__,
        "prompts": [list(each.prompt_token_ids or ()) for each in outputs],
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
    }


if __name__ == "__main__":
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1], json.loads(sys.argv[2])))}\n")
