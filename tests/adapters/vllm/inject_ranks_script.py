"""Injects one run's results into an engine of two ranks with a planted fault, and prints what came of it.

``python inject_ranks_script.py OUTPUT_DIR KIND DTYPE``, where KIND is ``tensor`` or ``pipeline``.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.helpers import prepare_stages, say_and_end

# With two pipeline stages, each has one of them.
FAULTY = (1, 2)
NORMS = [rf"layers\.{layer}\.post_attention_layernorm$" for layer in FAULTY]


def main(output_dir: str, kind: str, dtype: str) -> dict[str, Any]:
    """Capture the model as it is, with two faults, and with one or both of them injected away."""
    from vllm import LLM

    from tests.models import tiny_llama

    several: dict[str, Any] = {f"{kind}_parallel_size": 2}
    llm = LLM(str(tiny_llama()), dtype=dtype, enforce_eager=True, max_model_len=128, **several)
    if kind == "pipeline":
        prepare_stages(llm)
    chance = random.Random(3)
    prompts = [{"prompt_token_ids": [chance.randrange(3, 500) for _ in range(n)]} for n in (5, 31, 12)]
    other = {"prompt_token_ids": [*prompts[1]["prompt_token_ids"][:-1], 2]}

    def captured(asked: list[Any], **keys: Any) -> dict[str, Any]:
        return _captured(llm, output_dir, asked, **keys)

    found = {"right": captured(prompts)}
    run = found["right"]["url"]
    found["same"] = captured(prompts, inject={"run": run, "modules": ["."]})
    with _fault(llm):
        found["wrong"] = captured(prompts)
        found["once"] = captured(prompts, inject={"run": run, "modules": NORMS[:1]})
        found["both"] = captured(prompts, inject={"run": run, "modules": NORMS})
        found["more"] = captured([*prompts, other], inject={"run": run, "modules": NORMS})
    return found


def _captured(llm: Any, output_dir: str, prompts: list[Any], **keys: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    import tlcore.vllm

    llm.reset_prefix_cache()
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    keys = {"log_step_ids": [], "backend": "safetensors", **keys}
    with tlcore.vllm.attach(llm, output_dir=output_dir, **keys) as attached:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {"url": attached.url, "tokens": [list(each.outputs[0].token_ids) for each in outputs]}


@contextmanager
def _fault(llm: Any) -> Iterator[None]:
    """Two norms compute something else in the block, on whichever ranks they are."""
    llm.collective_rpc(_scale_norms, args=(1.5,))
    yield
    llm.collective_rpc(_scale_norms, args=(1 / 1.5,))


def _scale_norms(worker: Any, factor: float) -> None:
    layers = worker.model_runner.get_model().model.layers
    for layer in FAULTY:
        norm = getattr(layers[layer], "post_attention_layernorm", None)
        if norm is not None:
            norm.weight.data.mul_(factor)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    say_and_end(main(*sys.argv[1:]))
