"""Runs two tensor-parallel workers under Ray on this machine, captured from the start.

``python ray_script.py CONFIG RAY_DIR``; prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).parents[3])


def main(config: dict[str, Any], ray_dir: str) -> dict[str, Any]:
    """Generate once, and look at the actors that Ray made."""
    import ray
    from vllm import LLM, SamplingParams

    import tlcore.vllm
    from tests.models import tiny_llama

    ray.init(
        num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=128 << 20, _temp_dir=ray_dir
    )
    try:
        llm = LLM(
            str(tiny_llama()),
            enforce_eager=True,
            max_model_len=256,
            tensor_parallel_size=2,
            distributed_executor_backend="ray",
            intermediate_log_config=config,
        )
        executor: Any = llm.llm_engine.engine_core.engine_core.model_executor
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        llm.generate(["the quick brown fox"], sampling, use_tqdm=False)
        static = [answer["url"] for answer in llm.collective_rpc("tlcore_stop")]
        with tlcore.vllm.attach(llm, output_dir=config["output_dir"]) as attached:
            llm.generate(["the lazy dog"], sampling, use_tqdm=False)
        names = type(executor).__mro__
        llm.llm_engine.engine_core.shutdown()
        return {
            "executor": [each.__name__ for each in names],
            "static": static,
            "attached": attached.url,
        }
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, REPOSITORY)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    sys.stdout.write(f"REPORT {json.dumps(main(json.loads(sys.argv[1]), sys.argv[2]))}\n")
