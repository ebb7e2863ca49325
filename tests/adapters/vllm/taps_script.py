"""Captures an in-process engine once and prints what vLLM compiled or loaded for it as a JSON line.

``python taps_script.py MODEL CONFIG MODE DTYPE OPTIONS``, where OPTIONS is a JSON object of further arguments
for ``LLM``, and of ``shows``: whether the model's code shows values by `tlcore.tap`. With the mode
``piecewise`` the model is compiled as on a GPU, in pieces around its attention, which the CPU platform leaves
out; ``plain`` is what the CPU platform does, ``eager`` does not compile.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import tlcore

PROMPTS = ["the quick brown fox jumps over", "the lazy dog"]
TOKENS = 4


def compile_piecewise() -> None:
    """Keep vLLM's CPU platform from choosing another compilation mode than its other platforms have."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        mode, backend = compilation.mode, compilation.backend
        original(cls, vllm_config)
        compilation.mode, compilation.backend, compilation.compile_sizes = mode, backend, []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    # It names kernels of vLLM's CUDA build.
    FixFunctionalizationPass.__call__ = lambda self, graph: None


def show_values_within() -> None:
    """Let code of vLLM's show values: that of parts of the compiled model, and its own."""
    from vllm.model_executor.models import llama

    # No closure, which could not be stored with the compiled code.
    whole = llama.LlamaModel.whole = llama.LlamaModel.forward

    def of_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        return tlcore.tap("hidden", self.whole(*args, **kwargs)) + 0

    def of_mlp(self: Any, x: Any) -> Any:
        both, _ = self.gate_up_proj(x)
        gated, _ = self.down_proj(tlcore.tap("gated", self.act_fn(both)))
        return tlcore.tap("gated", gated)

    llama.LlamaModel.forward = functools.wraps(whole)(of_model)
    llama.LlamaMLP.forward = of_mlp


def main(
    model: str, config: dict[str, Any], mode: str, dtype: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Generate greedily from all prompts."""
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter as counter

    from tests.adapters.vllm.helpers import prepare_stages

    if mode == "piecewise":
        compile_piecewise()
    if options.pop("shows", False):
        show_values_within()
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=256,
        enable_prefix_caching=False,
        enforce_eager=mode == "eager",
        intermediate_log_config=config,
        **options,
    )
    if mode == "eager" and "pipeline_parallel_size" in options:
        prepare_stages(llm)
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return {
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "compiled": counter.num_aot_compiles,
        "loaded": counter.num_aot_artifacts_loaded,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _model, _config, _mode, _dtype, _options = sys.argv[1:]
    found = main(_model, json.loads(_config), _mode, _dtype, json.loads(_options))
    sys.stdout.write(f"REPORT {json.dumps(found)}\n")
