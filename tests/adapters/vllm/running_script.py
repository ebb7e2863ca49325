"""Attaches to a running in-process engine, changes and detaches, and prints what came of it as a JSON line.

``python running_script.py OUTPUT_DIR``
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPT = "the quick brown fox jumps over"
REPOSITORY = str(Path(__file__).parents[3])


def main(output_dir: str) -> dict[str, Any]:
    """Generate before, while and after different captures of one engine."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm
    from tests.models import tiny_llama

    llm = LLM(str(tiny_llama()), enforce_eager=True, max_model_len=256, enable_prefix_caching=False)
    core: Any = llm.llm_engine.engine_core
    model = core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    report: dict[str, Any] = {"tokens": [], "hooks": [], "refused": []}

    def generate() -> None:
        (output,) = llm.generate([PROMPT], sampling, use_tqdm=False)
        report["tokens"].append(list(output.outputs[0].token_ids))
        report["hooks"].append(
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        )

    def refused(**keys: Any) -> None:
        try:
            tlcore.vllm.attach(llm, {"output_dir": output_dir, **keys})
        except tlcore.TlcoreError as error:
            report["refused"].append([type(error).__name__, str(error)])

    generate()
    refused(log_step_ids="first")
    refused(backend="tests.sinks:MemorySink", enabled=False)
    with tlcore.vllm.attach(llm, {"output_dir": output_dir, "log_step_ids": [0, 2]}) as attached:
        generate()
        refused()
        report["running"] = attached.status().to_json()
        try:
            attached.change(outputdir="x")
        except tlcore.ConfigError:
            report["state_after_bad_change"] = attached.status().state
        attached.change(output_dir=output_dir, module_call_match="mlp$", log_step_ids=[])
        generate()
        report["changed"] = attached.url
    report["closed"] = attached.status().to_json()
    few = {"output_dir": f"{output_dir}_modes", "module_call_match": "mlp"}
    with tlcore.vllm.attach(llm, {**few, "capture": "both", "backend": "safetensors"}) as attached:
        generate()
        report["both"] = attached.url
        attached.change(**few, capture="stats")
        generate()
        report["stats"] = attached.url
    generate()
    return report


if __name__ == "__main__":
    sys.path.insert(0, REPOSITORY)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1]))}\n")
