"""Runs requests through an engine whose batches are hard to tell apart, and prints a JSON line.

``python rows_script.py OUTPUT_DIR WAY RUNNER MIXES PLANTS CODE``: `ways` are known. Each captures a run of
all rows, one of each request's last row, one of a single request, one of the rows behind the prompts, and
random mixes, some with planted faults.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.adapters import NAMES, RANK, write_adapter
from tests.adapters.vllm.drafters import speculator, target_of
from tests.adapters.vllm.helpers import answered, prepare_stages, say_and_end
from tests.adapters.vllm.mixes import run_mix
from tests.adapters.vllm.replicas import Replicas
from tests.adapters.vllm.second_runner import use_second_runner
from tests.fuzz.plants import PLANTS

MODULES = [r"embed_tokens$", r"model\.norm$", r"layers\.2$", "logits", r"^draft\."]
COMMON = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}
# So little room that a few requests preempt each other.
CROWDED = {
    "async_scheduling": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "num_gpu_blocks_override": 7,
}

# With adapters: alone, with proposed tokens, and in a compiled model.
ADAPTED = ("adapters", "adapters_ngram", "adapters_compiled")
RANKS = {"tensor": "tensor_parallel_size", "pipeline": "pipeline_parallel_size"}


def ways(way: str, output_dir: Path) -> dict[str, Any]:
    """The engine's arguments, by the name of what is hard about them; else ``way`` is a speculator."""
    if way in ("chunks", "data"):
        return {"max_num_batched_tokens": 24, "async_scheduling": True, **CROWDED}
    if way in RANKS:
        return {RANKS[way]: 2, "max_num_batched_tokens": 24, **CROWDED}
    if way in ADAPTED:
        found = {"enable_lora": True, "max_loras": len(NAMES), "max_lora_rank": RANK}
        others = {"adapters_ngram": ways("ngram", output_dir), "adapters_compiled": {"enforce_eager": False}}
        return found | others.get(way, {})
    return {"speculative_config": speculator(way, output_dir)}


def main(output_dir: str, way: str, runner: str, mixes: str, plants: str, code: str) -> dict[str, Any]:
    """Capture the same requests in three ways, with the first or the second of vLLM's model runners.

    The model is run by vLLM's or by transformers' ``code``.
    """
    if runner == "second":
        use_second_runner()
    from vllm import LLM

    model, arguments = target_of(way, Path(output_dir)), ways(way, Path(output_dir))
    engine: Any = Replicas if way == "data" else LLM
    llm = engine(str(model), dtype="float32", model_impl=code, **{**COMMON, **arguments})
    if way == "pipeline":
        prepare_stages(llm)
    speculates = "speculative_config" in arguments
    # vLLM 0.32 fails at the logits of whole prompts where it takes adapters.
    report = {"model": str(model), **_three_ways(llm, output_dir, prompt_logits=way in ("chunks", "data"))}
    found = [run_mix(llm, output_dir, seed) for seed in range(int(mixes))]
    for seed in range(int(plants)):
        found += [run_mix(llm, output_dir, seed, name) for name in PLANTS if name != "believed" or speculates]
    if way in ADAPTED:
        report["adapters"] = _adapters(llm, Path(output_dir), report["prompts"])
    if way == "data":
        llm.close()
    return {**report, "mixes": found}


def _adapters(llm: Any, output_dir: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The same prompts with each of two adapters, all in one batch.

    One without an adapter would get the last one's part in such a batch, from vLLM's kernels for CPUs.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    import tlcore.vllm

    asked = [(name, prompt) for name in NAMES for prompt in prompts[:2]]
    written = {name: write_adapter(output_dir, name) for name in NAMES}
    loras = {name: LoRARequest(name, place, str(written[name][0])) for place, name in enumerate(NAMES, 1)}
    with tlcore.vllm.attach(
        llm,
        output_dir=str(output_dir),
        log_step_ids=[],
        module_call_match=MODULES,
        backend="safetensors",
    ) as attached:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in asked],
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
            lora_request=[loras[name] for name, _ in asked],
            use_tqdm=False,
        )
    requests = [
        {"id": output.request_id, "name": name, "tokens": prompt + list(output.outputs[0].token_ids)}
        for (name, prompt), output in zip(asked, outputs, strict=True)
    ]
    merged = {name: str(path) for name, (_, path) in written.items()}
    return {"url": attached.url, "merged": merged, "requests": requests}


def _three_ways(llm: Any, output_dir: str, prompt_logits: bool) -> dict[str, Any]:
    from vllm import SamplingParams

    import tlcore.vllm

    chance = random.Random(3)
    prompts = [[chance.randrange(3, 512) for _ in range(n)] for n in (5, 31, 12, 3, 18, 9)]
    # Repetition, for a speculator to find.
    prompts = [prompt + prompt[-4:] * 2 for prompt in prompts]
    lengths = [14, 20, 8, 18, 3, 11]
    report: dict[str, Any] = {"prompts": prompts}
    runs: list[tuple[str, dict[str, Any]]] = [("all", {}), ("last", {"rows": "last"}), ("one", {})]
    runs.append(("response", {"rows": "response"}))
    for name, keys in runs:
        if name == "one":
            # Requests are numbered through.
            keys = {"request_ids": f"^{int(report['last']['ids'][-1]) + 2}-"}
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=length,
                ignore_eos=True,
                prompt_logprobs=0 if i % 2 and prompt_logits else None,
            )
            for i, length in enumerate(lengths)
        ]
        llm.reset_prefix_cache()
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
        report[name] = answered(attached.url, outputs)
    return report


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Functions of the tests, run in the workers of engines in other processes.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    say_and_end(main(*sys.argv[1:]))
