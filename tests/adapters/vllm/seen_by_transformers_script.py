"""Captures requests with images in an engine of `seen_by_transformers`' model, and prints a JSON line.

``python seen_by_transformers_script.py OUTPUT_DIR``: a run of all requests, and one of the third one's rows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.helpers import answered, say_and_end
from tests.adapters.vllm.seen_by_transformers import ASKED, IMAGE, pictures, write_model

CHOSEN = 2


def main(output_dir: str) -> dict[str, Any]:
    """What was answered in each run, and where it lies."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm

    model = Path(output_dir) / "model"
    model.mkdir()
    write_model(model)
    llm = LLM(
        str(model),
        dtype="float32",
        model_impl="transformers",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        limit_mm_per_prompt={"image": 2},
        enable_prefix_caching=False,
    )
    token = int(llm.get_tokenizer().convert_tokens_to_ids(IMAGE))
    asked: list[Any] = []
    for (first, *others), seeds in ASKED:
        ids = [first]
        for place, own in enumerate(others):
            ids += [token, own] if place < len(seeds) else [own]
        asked.append({"prompt_token_ids": ids})
        if seeds:
            asked[-1]["multi_modal_data"] = {"image": pictures(seeds)}
    report: dict[str, Any] = {"model": str(model)}
    for name, keys in (("all", {}), ("one", {"request_ids": f"^{len(ASKED) + CHOSEN}-"})):
        llm.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        with tlcore.vllm.attach(
            llm, output_dir=output_dir, log_step_ids=[], backend="safetensors", **keys
        ) as attached:
            outputs = llm.generate(
                asked, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), use_tqdm=False
            )
        report[name] = answered(attached.url, outputs)
    return report


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    say_and_end(main(*sys.argv[1:]))
