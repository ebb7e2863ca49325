"""Captures the same prompts plainly, in a narrower dtype and as channel statistics, and prints a JSON line.

``python less_script.py MODEL OUTPUT_DIR``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MODULES = [r"layers\.\d+$", r"model\.norm$"]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "converted": {"store_dtype": "bfloat16"},
    "packed": {"store_dtype": "int8", "rows": {"from": -2}},
    "channels": {"capture": "channels", "rows": "response"},
}


def main(model: str, output_dir: str) -> dict[str, Any]:
    """Each way's run, and the tokens that came of it."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm

    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=64, enable_prefix_caching=False)
    prompts = [
        {"prompt_token_ids": list(range(start, start + n))} for start, n in ((5, 9), (40, 4), (90, 13))
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    found = {}
    for name, keys in WAYS.items():
        common = {"output_dir": output_dir, "log_step_ids": [], "module_call_match": MODULES}
        with tlcore.vllm.attach(llm, {**common, "backend": "safetensors", **keys}) as attached:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        found[name] = {
            "url": attached.url,
            "tokens": [list(each.outputs[0].token_ids) for each in outputs],
            "ids": [each.request_id for each in outputs],
        }
    return found


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.stdout.write(f"REPORT {json.dumps(main(*sys.argv[1:]))}\n")
