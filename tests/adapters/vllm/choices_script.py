"""Runs requests that choose their own capture through one engine in this process, and prints a JSON line.

``python choices_script.py OUTPUT_DIR``: everything of a batch, then what the same requests choose of it, in
an engine that else captures nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

CHOICES: list[Any] = [
    {"modules": ["model.layers.2.mlp"], "rows": "response"},
    None,
    {"enabled": False},
    json.dumps({"rows": "last"}),
]
WRONG: list[Any] = [
    {"rowz": "last"},
    {"rows": {"from": 3, "to": 1}},
    {"modules": ["layers.2.mlp"]},
    "{",
    [1],
]


def main(output_dir: str) -> dict[str, Any]:
    """Capture a batch whole, and as its requests choose; try wrong choices."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm
    from tests.models import tiny_llama

    llm = LLM(str(tiny_llama()), enforce_eager=True, max_model_len=128, enable_prefix_caching=False)
    prompts: list[Any] = [{"prompt_token_ids": [3 + each, 7, 11, 13 + each]} for each in range(len(CHOICES))]

    def generate(choices: list[Any]) -> list[str]:
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=3,
                ignore_eos=True,
                extra_args=None if choice is None else {"tlcore": choice},
            )
            for choice in choices
        ]
        return [output.request_id for output in llm.generate(prompts, sampling, use_tqdm=False)]

    def refused(choice: Any) -> str:
        try:
            # The others of the batch are right.
            generate([None, {"enabled": False}, choice, None])
        except ValueError as error:
            return str(error)
        return ""

    report: dict[str, Any] = {"without a run": refused({"rows": "last"})}
    modules = [r"embed_tokens$", r"layers\.[02]\.mlp$", "norm$", "logits"]
    keys = {"output_dir": output_dir, "module_call_match": modules, "backend": "safetensors"}
    with tlcore.vllm.attach(llm, keys, log_step_ids=[]) as attached:
        report["all"] = {"ids": generate([None] * len(CHOICES)), "url": attached.url}
        report["not allowed"] = refused({"rows": "last"})
    overrides = ["enabled", "modules", "rows"]
    with tlcore.vllm.attach(llm, keys, log_step_ids=[10**6], request_overrides=overrides) as attached:
        report["wrong"] = [refused(choice) for choice in WRONG]
        ids = generate(CHOICES)
        # Before it is committed in its own time.
        live = attached.request(ids[0])
        report["chosen"] = {
            "ids": ids,
            "url": attached.url,
            "live": {name: live.positions(name) for name in live},
        }
    return report


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.stdout.write(f"REPORT {json.dumps(main(*sys.argv[1:]))}\n")
