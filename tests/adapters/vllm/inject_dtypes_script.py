"""Injects into an engine of one dtype what it computed itself and what one of another dtype did.

``python inject_dtypes_script.py OUTPUT_DIR DTYPE [RUN]``: prints as a JSON line what came of it. ``RUN`` is
one that the script has captured with another dtype.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.helpers import say_and_end

MODULES = [r"layers\.1$", r"model\.norm$"]


def main(output_dir: str, dtype: str, other: str = "") -> dict[str, Any]:
    """Capture the engine as it is, then with its own results injected, and with those of the other run."""
    from vllm import LLM

    from tests.models import tiny_llama

    # Prompts are cached, and looked up in the cache, by whole blocks.
    caching: dict[str, Any] = {"enable_prefix_caching": True, "block_size": 32}
    llm = LLM(str(tiny_llama()), dtype=dtype, enforce_eager=True, max_model_len=128, **caching)
    chance = random.Random(5)
    prompts = [[chance.randrange(3, 500) for _ in range(n)] for n in (40, 9, 70)]
    found = {"right": _captured(llm, output_dir, prompts)}
    own = found["right"]["url"]
    found["same"] = _captured(llm, output_dir, prompts, inject={"run": own, "modules": ["."]})
    # One is forbidden its first token and goes on otherwise, two have a longer prompt than any in that run.
    first = found["right"]["tokens"][0][0]
    asked = [*prompts, [*prompts[2], 7], [8, *prompts[0]]]
    bias = [{first: -100.0}, *[None] * 4]
    inject = {"run": own, "modules": MODULES}
    found["parted"] = _captured(llm, output_dir, asked, bias, module_call_match=MODULES, inject=inject)
    # What was injected is in nobody's prefix cache, and what others left there is not taken.
    found["cached"] = _captured(llm, output_dir, [[*each, 9] for each in prompts])
    found["again"] = _captured(llm, output_dir, prompts, inject={"run": own, "modules": ["."]})
    if other:
        found["other"] = _captured(llm, output_dir, prompts, inject={"run": other, "modules": MODULES})
    return found


def _captured(
    llm: Any, output_dir: str, prompts: list[list[int]], bias: Any = None, **keys: Any
) -> dict[str, Any]:
    from vllm import SamplingParams

    import tlcore.vllm

    sampling = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logit_bias=each)
        for each in bias or [None] * len(prompts)
    ]
    keys = {"log_step_ids": [], "backend": "safetensors", **keys}
    with tlcore.vllm.attach(llm, output_dir=output_dir, **keys) as attached:
        outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
    return {"url": attached.url, "tokens": [list(each.outputs[0].token_ids) for each in outputs]}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    say_and_end(main(*sys.argv[1:]))
