"""Runs an in-process vLLM engine once and prints what came of it as one JSON line.

``python engine_script.py MODEL CONFIG``, where CONFIG is the JSON configuration or ``null``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tests.deep import scaled
from tests.toys import hook_count

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The first three prime numbers are",
    "A neural network learns by",
    "Once upon a time there was a",
    "The opposite of hot is",
    "In the year 1969, people first",
    "My favourite colour is",
]
TOKENS = scaled(12, 32)


def main(model: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Generate greedily from all prompts, queued at once, and describe the process afterwards."""
    from vllm import LLM, SamplingParams

    extra = {} if config is None else {"intermediate_log_config": config}
    llm = LLM(model=model, enforce_eager=True, max_model_len=256, enable_prefix_caching=False, **extra)
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    core: Any = llm.llm_engine.engine_core
    root = core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    report = {
        "prompts": [list(each.prompt_token_ids or ()) for each in outputs],
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "threads": [thread.name for thread in threading.enumerate()],
        "hooks": hook_count(root),
        "decoder": [type(root.model).__name__, len(type(root.model).__mro__)],
    }
    del llm, core, root, outputs
    gc.collect()
    if config is not None:
        runs = [json.loads(path.read_text()) for path in Path(config["output_dir"]).glob("*/run.json")]
        report["states"] = [run["state"] for run in runs]
    return report


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1], json.loads(sys.argv[2])))}\n")
