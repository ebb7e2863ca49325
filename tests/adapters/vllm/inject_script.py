"""Injects one run's results into an engine with planted faults, and prints what came of it as a JSON line.

``python inject_script.py OUTPUT_DIR WAY RUNNER``: the way ``plain`` is SmolLM2 in one batch, ``crowded`` a
small model whose prompts are computed in chunks and preempted, ``transformers`` the same run by transformers'
code, ``drafts`` one that speculates.
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

from tests.adapters.vllm.drafters import speculator, target_of
from tests.adapters.vllm.helpers import say_and_end
from tests.adapters.vllm.second_runner import use_second_runner

TEXTS = ["The capital of France is", "Water boils at a temperature of", "Once upon a time there was a"]
CROWDED = {"max_num_seqs": 4, "block_size": 32, "num_gpu_blocks_override": 7, "max_num_batched_tokens": 24}
MODULES = [r"layers\.\d+$", r"layers\.\d+\.mlp$", r"model\.norm$", "logits_processor"]


def main(output_dir: str, way: str, runner: str) -> dict[str, Any]:
    """Capture the model as it is, with two faults, and with one or both of them injected away."""
    if runner == "second":
        use_second_runner()
    from vllm import LLM

    from tests.models import smollm2, tiny_llama

    model, more = (smollm2() if way == "plain" else tiny_llama()), dict[str, Any]()
    if way in ("crowded", "transformers"):
        more = CROWDED | ({"model_impl": "transformers"} if way == "transformers" else {})
    if way == "drafts":
        # Triton's interpreter does not take a mask of the second runner's n-grams.
        method = "draft_model" if runner == "second" else "ngram"
        drafter = Path(output_dir, "drafter")
        drafter.mkdir()
        model = target_of(method, drafter)
        more = {"speculative_config": speculator(method, drafter), "max_num_seqs": 4}
    llm = LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=128, **more)
    return _Engine(llm, output_dir, way).report()


class _Engine:
    def __init__(self, llm: Any, output_dir: str, way: str) -> None:
        self._llm = llm
        self._output_dir = output_dir
        chance = random.Random(3)
        numbers = [[chance.randrange(3, 500) for _ in range(n)] for n in (5, 31, 12, 18)]
        ids = [{"prompt_token_ids": prompt + prompt[-4:] * 2} for prompt in numbers]
        self._prompts: list[Any] = list(TEXTS) if way == "plain" else ids
        core: Any = llm.llm_engine.engine_core
        self._model = core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
        last = len(self._model.model.layers) - 1
        self._faulty = (1, last - 1)

    def report(self) -> dict[str, Any]:
        """All runs by name: their addresses, and the tokens that were generated."""
        modules = [rf"layers\.{layer}$" for layer in self._faulty]
        found: dict[str, Any] = {"modules": modules, "layers": self._faulty}
        right = self._captured(self._prompts)
        found["right"] = right
        found["same"] = self._captured(self._prompts, inject={"run": right["url"], "modules": ["."]})
        found["injected_ops"] = self._captured(
            self._prompts[:1], inject={"run": right["url"], "modules": modules[:1]}, ops=[r"layers\.1\."]
        )
        with self._fault():
            found["wrong"] = self._captured(self._prompts)
            found["once"] = self._captured(
                self._prompts, inject={"run": right["url"], "modules": modules[:1]}
            )
            asked = [*self._prompts, _other(self._prompts[0])]
            found["both"] = self._captured(asked, inject={"run": right["url"], "modules": modules})
            # What was injected must not be what others find in the prefix cache.
            found["after"] = [self._generated(self._prompts) for _ in range(2)]
            found["late"] = self._captured(
                self._prompts[:1], inject={"run": right["url"], "modules": modules}, log_step_ids=[1, 2]
            )
        return found

    def _generated(self, prompts: list[Any]) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        return [
            list(each.outputs[0].token_ids) for each in self._llm.generate(prompts, sampling, use_tqdm=False)
        ]

    def _captured(self, prompts: list[Any], **keys: Any) -> dict[str, Any]:
        import tlcore.vllm

        if "inject" not in keys:
            self._llm.reset_prefix_cache()
        keys = {"log_step_ids": [], "module_call_match": MODULES, "backend": "safetensors", **keys}
        with tlcore.vllm.attach(self._llm, output_dir=self._output_dir, **keys) as attached:
            tokens = self._generated(prompts)
        return {"url": attached.url, "tokens": tokens}

    @contextmanager
    def _fault(self) -> Iterator[None]:
        """Two layers compute something else in the block."""
        norms = [self._model.model.layers[layer].post_attention_layernorm for layer in self._faulty]
        weights = [norm.weight for norm in norms]
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.data.mul_(1.5)
        self._llm.reset_prefix_cache()
        yield
        for weight, values in zip(weights, before, strict=True):
            weight.data.copy_(values)


def _other(prompt: Any) -> Any:
    return (
        f"Not {prompt}" if isinstance(prompt, str) else {"prompt_token_ids": prompt["prompt_token_ids"][1:]}
    )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    say_and_end(main(*sys.argv[1:]))
