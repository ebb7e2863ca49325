"""Runs requests through an engine whose batches are hard to tell apart, and prints a JSON line.

``python rows_script.py OUTPUT_DIR WAY``: `ways` are known. Each captures a run of all rows, one of each
request's last row, and one of a single request.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

MODULES = [r"embed_tokens$", r"model\.norm$", r"layers\.2$", "logits"]
COMMON = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


def ways() -> dict[str, dict[str, Any]]:
    """The engine's arguments, by the name of what is hard about them."""
    from tests.models import tiny_llama

    draft = {"method": "draft_model", "model": str(tiny_llama()), "num_speculative_tokens": 3}
    return {
        "ngram": {"speculative_config": NGRAM},
        "draft": {"speculative_config": draft},
        "chunks": {"max_num_batched_tokens": 24, "enable_chunked_prefill": True},
        "async": {"async_scheduling": True},
    }


def main(output_dir: str, way: str) -> dict[str, Any]:
    """Capture the same requests in three ways."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm
    from tests.models import tiny_llama

    llm = LLM(str(tiny_llama()), dtype="float32", **{**COMMON, **ways()[way]})
    chance = random.Random(3)
    prompts = [[chance.randrange(3, 512) for _ in range(n)] for n in (5, 31, 12, 3, 18, 9)]
    # Repetition, for the n-gram speculator to find.
    prompts = [prompt + prompt[-4:] * 2 for prompt in prompts]
    lengths = [14, 20, 8, 18, 3, 11]
    report: dict[str, Any] = {"prompts": prompts}
    runs: list[tuple[str, dict[str, Any]]] = [("all", {}), ("last", {"rows": "last"}), ("one", {})]
    for name, keys in runs:
        if name == "one":
            # Requests are numbered through.
            keys = {"request_ids": f"^{int(report['last']['ids'][-1]) + 2}-"}
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=length,
                ignore_eos=True,
                prompt_logprobs=0 if i % 2 and "speculative_config" not in ways()[way] else None,
            )
            for i, length in enumerate(lengths)
        ]
        with tlcore.vllm.attach(
            llm,
            output_dir=output_dir,
            log_step_ids=[],
            module_call_match=MODULES,
            backend="safetensors",
            **keys,
        ) as attached:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
            )
        report[name] = {
            "url": attached.url,
            "ids": [output.request_id for output in outputs],
            "tokens": [
                prompt + list(output.outputs[0].token_ids)
                for prompt, output in zip(prompts, outputs, strict=True)
            ],
        }
    return report


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.stdout.write("\nREPORT " + json.dumps(main(*sys.argv[1:])) + "\n")
    sys.stdout.flush()
    os._exit(0)
