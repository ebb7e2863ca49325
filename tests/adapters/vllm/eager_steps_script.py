"""Captures one compiled in-process engine in several ways, and prints what came of it as a JSON line.

``python eager_steps_script.py OUTPUT_DIR``. The tensors that plain forward hooks see when every step is run
by vLLM's ``skip_compiled`` are saved as ``OUTPUT_DIR/reference.pt``, under the names that tlcore gives them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPTS = ["the quick brown fox jumps over", "the lazy dog", "over the dog jumps the quick fox"]
TOKENS = 4


@contextmanager
def every_step_eager(model: Any, seen: dict[str, Any]) -> Iterator[None]:
    """Run all steps by ``skip_compiled`` and note every module's tensors, without tlcore."""
    import vllm.forward_context

    step, calls, original = -1, dict[str, int](), vllm.forward_context.create_forward_context

    def create_forward_context(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        calls.clear()
        context = original(*args, **kwargs)
        context.skip_compiled = True
        return context

    def note(name: str, output: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        place = f"step_{step}/{name}{f'_{call}' if call else ''}/outputs"
        if not isinstance(output, tuple):
            seen[f"{place}_cpu"] = output.clone()
            return
        for i, item in enumerate(output):
            if item is not None:
                seen[f"{place}_{i}_cpu"] = item.clone()

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if name and name != "model"
    ]
    vllm.forward_context.create_forward_context = create_forward_context
    try:
        yield
    finally:
        vllm.forward_context.create_forward_context = original
        for handle in handles:
            handle.remove()


def main(output_dir: str) -> dict[str, Any]:
    """Generate plainly, with every step captured, with one, and with every step eager by other means."""
    import torch
    from vllm import LLM, SamplingParams

    import tlcore.vllm
    from tests.models import tiny_llama

    llm = LLM(str(tiny_llama(2)), max_model_len=256, enable_prefix_caching=False)
    core: Any = llm.llm_engine.engine_core
    model = core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    compiled, compiled_calls = model.model.aot_compiled_fn, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled_calls
        compiled_calls += 1
        return compiled(*args, **kwargs)

    model.model.aot_compiled_fn = counted
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    report: dict[str, Any] = {"compiled_calls": {}, "tokens": {}, "runs": {}}

    def generate(what: str) -> None:
        nonlocal compiled_calls
        compiled_calls = 0
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        report["tokens"][what] = [list(each.outputs[0].token_ids) for each in outputs]
        report["compiled_calls"][what] = compiled_calls

    generate("plain")
    for what, steps in (("all", []), ("one", [1])):
        with tlcore.vllm.attach(llm, {"output_dir": output_dir, "log_step_ids": steps}) as attached:
            generate(what)
        report["runs"][what] = attached.url
    generate("after")
    reference: dict[str, Any] = {}
    with every_step_eager(model, reference):
        generate("reference")
    torch.save(reference, Path(output_dir) / "reference.pt")
    return report


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.stdout.write(f"REPORT {json.dumps(main(sys.argv[1]))}\n")
