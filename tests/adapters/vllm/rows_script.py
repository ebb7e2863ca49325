"""Runs requests through an engine whose batches are hard to tell apart, and prints a JSON line.

``python rows_script.py OUTPUT_DIR WAY [RUNNER]``: `ways` are known. Each captures a run of all rows, one of
each request's last row, and one of a single request.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.second_runner import use_second_runner

MODULES = [r"embed_tokens$", r"model\.norm$", r"layers\.2$", "logits"]
COMMON = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


def drafter(directory: Path) -> str:
    """The tiny model with other weights in its last layer, so that only some of what it proposes is right."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests.models import tiny_llama

    shutil.copytree(tiny_llama(), directory)
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in weights.items():
        if "layers.3.mlp" in name:
            weight += torch.randn_like(weight) * weight.std()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def ways(output_dir: str) -> dict[str, dict[str, Any]]:
    """The engine's arguments, by the name of what is hard about them."""
    draft = {"method": "draft_model", "num_speculative_tokens": 3, "model": f"{output_dir}/draft"}
    return {
        "ngram": {"speculative_config": NGRAM},
        "draft": {"speculative_config": draft},
        "chunks": {"max_num_batched_tokens": 24, "enable_chunked_prefill": True},
        "async": {"async_scheduling": True},
    }


def main(output_dir: str, way: str, runner: str = "first") -> dict[str, Any]:
    """Capture the same requests in three ways, with the first or the second of vLLM's model runners."""
    if runner == "second":
        use_second_runner()
    from vllm import LLM, SamplingParams

    import tlcore.vllm
    from tests.models import tiny_llama

    if way == "draft":
        drafter(Path(output_dir) / "draft")
    arguments = ways(output_dir)[way]
    llm = LLM(str(tiny_llama()), dtype="float32", **{**COMMON, **arguments})
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
                prompt_logprobs=0 if i % 2 and "speculative_config" not in arguments else None,
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
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.stdout.write("\nREPORT " + json.dumps(main(*sys.argv[1:])) + "\n")
    sys.stdout.flush()
    os._exit(0)
