"""Captures the same prompts in a real engine, in ways that make it hard to tell whose row is whose.

``python -m tlcore.adapters.vllm.selftest DIRECTORY`` starts one engine (`tlcore.adapters.processes`).
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...record import Json
from ..processes import answer
from .frontend.attach import attach

BLOCK = 32
# Each grows into another block of the cache while it generates; the third begins as the first does.
LENGTHS = (61, 30, 59, 28)
_SHARED = 40
_FEW_TOKENS, _MANY_TOKENS = 8, 24
_COMMON: Json = {
    "block_size": BLOCK,
    "max_model_len": 3 * BLOCK,
    "max_num_seqs": len(LENGTHS),
    "enforce_eager": True,
    "enable_prefix_caching": False,
}
# The arguments of each engine, and the ways that it is run.
ENGINES: dict[str, tuple[Json, tuple[str, ...]]] = {
    "plain": (
        {"num_gpu_blocks_override": 64, "enable_prefix_caching": True},
        ("alone", "batched", "prefix cache"),
    ),
    # The prompts fit into the cache, but not all that follows: 10 blocks of 8, one being vLLM's own. Layers
    # with a sliding window would take blocks beside those.
    "crowded": (
        {
            "num_gpu_blocks_override": 9,
            "max_num_batched_tokens": 24,
            "disable_hybrid_kv_cache_manager": True,
        },
        ("chunked prefill", "preempted"),
    ),
    "compiled": ({"num_gpu_blocks_override": 64, "enforce_eager": False}, ("compiled",)),
}


def make_prompts(vocabulary: int, seed: int) -> list[list[int]]:
    """Random prompts; what has a meaning of its own is mostly at either end of a vocabulary."""
    chance = random.Random(seed)
    found = [[chance.randrange(vocabulary // 8, vocabulary // 2) for _ in range(n)] for n in LENGTHS]
    found[2][:_SHARED] = found[0][:_SHARED]
    return found


def main(settings: Json, directory: Path) -> Json:
    """Run an engine in each of its ways; the runs, and what was asked for and answered in them."""
    from vllm import LLM

    arguments, ways = ENGINES[settings["engine"]]
    capture = {
        "output_dir": str(directory / "runs"),
        "module_call_match": settings["modules"],
        "log_step_ids": [],
        "backend": "safetensors",
    }
    taps = {"intermediate_log_config": {**capture, "compiled": "taps"}} if "compiled" in ways else {}
    llm = LLM(
        settings["model"],
        dtype=settings["dtype"],
        **{**_COMMON, **arguments, **settings["arguments"]},
        **taps,
    )
    prompts = make_prompts(llm.llm_engine.vllm_config.model_config.get_vocab_size(), settings["seed"])
    if taps:
        found = {"compiled": _generate(llm, "compiled", prompts)}
        # The run ends with its engine.
        del llm
        gc.collect()
        (found["compiled"]["url"],) = map(str, (directory / "runs").iterdir())
    else:
        found = {way: _attached(llm, way, prompts, capture) for way in settings["ways"]}
    return {"ways": found, "prompts": prompts}


def _attached(llm: Any, way: str, prompts: Sequence[list[int]], capture: Json) -> Json:
    if way == "prefix cache":
        _generate(llm, way, prompts)
    with attach(llm, capture) as attached:
        found = _generate(llm, way, prompts)
    return {**found, "url": attached.url}


def _generate(llm: Any, way: str, prompts: Sequence[list[int]]) -> Json:
    from vllm import SamplingParams

    count = _MANY_TOKENS if way == "preempted" else _FEW_TOKENS
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    # As many requests at once as the way is about; a prompt with salt of its own finds nothing in the cache.
    together = {"alone": 1, "chunked prefill": 2}.get(way, len(prompts))
    salted = way in ("alone", "batched")
    given: list[dict[str, Any]] = [
        {"prompt_token_ids": prompt, **({"cache_salt": f"{way} {place}"} if salted else {})}
        for place, prompt in enumerate(prompts)
    ]
    outputs: list[Any] = []
    for begin in range(0, len(given), together):
        outputs += llm.generate(given[begin : begin + together], sampling, use_tqdm=False)
    requests = [
        {"id": each.request_id, "tokens": [*prompt, *each.outputs[0].token_ids], "prompt": len(prompt)}
        for prompt, each in zip(prompts, outputs, strict=True)
    ]
    return {"requests": requests}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answer(main)
