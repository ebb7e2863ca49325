"""Runs requests through one engine in several ways, each way captured, and prints a JSON line.

``python requests_script.py OUTPUT_DIR [RUNNER]``, of vLLM's "first" or "second". The engine prefills in
chunks, caches prefixes, and has so little room that it must preempt.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.second_runner import use_second_runner

REQUESTS = 32
MODULES = [r"embed_tokens$", r"layers\.[03]$", r"layers\.2\.self_attn\.qkv_proj$", r"model\.norm$", "logits"]


def engine() -> Any:
    """A small engine with so little room that it must preempt."""
    from vllm import LLM

    from tests.models import tiny_llama

    return LLM(
        str(tiny_llama()),
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=192,
        max_num_seqs=REQUESTS,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32,
        num_gpu_blocks_override=26,
    )


def main(output_dir: str, runner: str = "first") -> dict[str, Any]:
    """Capture the same requests together and alone, a repeated prompt, and a request with two samples."""
    if runner == "second":
        use_second_runner()
    from vllm import SamplingParams

    import tlcore.vllm

    llm = engine()
    chance = random.Random(0)
    prompts = [[chance.randrange(3, 512) for _ in range(chance.randint(3, 100))] for _ in range(REQUESTS)]
    lengths = [chance.randint(4, 24) for _ in range(REQUESTS)]
    report: dict[str, Any] = {"prompts": prompts}

    def capture(name: str, batches: list[list[int]], rows: Any = "all", **sampling: Any) -> None:
        """One run: each batch of requests is put in at once, into an engine that has nothing cached."""
        ids: dict[int, str] = {}
        tokens: dict[int, list[int]] = {}
        with tlcore.vllm.attach(
            llm,
            output_dir=output_dir,
            log_step_ids=[],
            module_call_match=MODULES,
            backend="safetensors",
            rows=rows,
        ) as attached:
            for batch in batches:
                if name != "again":
                    llm.reset_prefix_cache()
                outputs = llm.generate(
                    [{"prompt_token_ids": prompts[each]} for each in batch],
                    [
                        SamplingParams(
                            **{
                                "temperature": 0.0,
                                "max_tokens": lengths[each],
                                "ignore_eos": True,
                                **sampling,
                            }
                        )
                        for each in batch
                    ],
                    use_tqdm=False,
                )
                for each, output in zip(batch, outputs, strict=True):
                    ids[each] = output.request_id
                    tokens[each] = list(output.outputs[0].token_ids)
        inside = sorted(ids)
        report[name] = {
            "url": attached.url,
            "ids": [ids[each] for each in inside],
            "asked": inside,
            # The last token is not fed again.
            "fed": [prompts[each] + tokens[each][:-1] for each in inside],
        }

    capture("together", [list(range(REQUESTS))])
    capture("alone", [[each] for each in range(REQUESTS)])
    longest = max(range(REQUESTS), key=lambda each: len(prompts[each]))
    report["longest"] = longest
    capture("first", [[longest]], max_tokens=2)
    capture("again", [[longest]], max_tokens=2)
    short = [each for each in range(REQUESTS) if len(prompts[each]) < 40]
    capture("window", [short], rows={"from": -2, "to": 40})
    capture("samples", [[0, longest]], n=2, temperature=1.0, seed=1, max_tokens=3)
    return report


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.stdout.write(f"REPORT {json.dumps(main(*sys.argv[1:]))}\n")
