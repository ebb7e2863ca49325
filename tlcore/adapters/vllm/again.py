"""A checkpoint that vLLM runs once over given tokens, captured.

``python -m tlcore.adapters.vllm.again DIRECTORY`` does it in a process of its own
(`tlcore.adapters.processes`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...record import Json
from ..processes import answer
from .frontend.attach import attach


def main(settings: Json, directory: Path) -> Json:
    """Capture the step in which all prompts are computed; the run's URL."""
    from vllm import LLM, SamplingParams

    prompts: list[list[int]] = settings["prompts"]
    # With the token that it answers with, and no more: a prompt may be as long as the model takes.
    longest = max(map(len, prompts)) + 1
    # One step for all of them, whatever the server that they were first given to would have made of them.
    arguments: Json = {
        "max_model_len": longest,
        "max_num_batched_tokens": max(sum(map(len, prompts)), longest),
        "max_num_seqs": len(prompts),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        **settings["arguments"],
    }
    llm = LLM(settings["model"], dtype=settings["dtype"] or "auto", **arguments)
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    with attach(llm, settings["config"]) as attached:
        llm.generate(given, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    return {"url": attached.url}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answer(main)
