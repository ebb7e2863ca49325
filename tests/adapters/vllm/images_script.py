"""Captures requests with images in one engine, in several ways, and prints a JSON line.

``python images_script.py OUTPUT_DIR``
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.adapters.vllm.helpers import answered, say_and_end
from tests.adapters.vllm.images import MIXED, SMALLS, Asked, write_model
from tlcore.layout.rows import RowSet


def main(output_dir: str) -> dict[str, Any]:
    """A run of all rows, runs of one request's, one of small images, and one with owners swapped."""
    from vllm import LLM, SamplingParams

    import tlcore.vllm

    model = Path(output_dir) / "model"
    model.mkdir()
    write_model(model)
    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=96,
        limit_mm_per_prompt={"image": 2},
        enable_prefix_caching=False,
    )
    image_token = int(llm.get_tokenizer().convert_tokens_to_ids("<image>"))
    report: dict[str, Any] = {"model": str(model)}
    numbered = 0

    def capture(name: str, asked: Sequence[Asked], chosen: int | None = None) -> None:
        nonlocal numbered
        keys = {} if chosen is None else {"request_ids": f"^{numbered + chosen}-"}
        llm.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        with tlcore.vllm.attach(
            llm, output_dir=output_dir, log_step_ids=[], backend="safetensors", **keys
        ) as attached:
            outputs = llm.generate(
                [each.prompt(image_token) for each in asked],
                SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
                use_tqdm=False,
            )
        numbered += len(asked)
        report[name] = answered(attached.url, outputs)

    capture("all", MIXED)
    for chosen in range(len(MIXED)):
        capture(f"one {chosen}", MIXED, chosen)
    capture("smalls", SMALLS)
    capture("small", SMALLS, 1)
    _swap_owners()
    capture("swapped", MIXED)
    return report


def _swap_owners() -> None:
    """Let the items of an encoder's calls belong to each other's requests."""
    row_scopes: Any = importlib.import_module("tlcore.adapters.vllm.worker.row_scopes")
    original = row_scopes.item_sets

    def swapped(runner: Any, refs: Sequence[tuple[str, Any]], known: Any) -> list[RowSet]:
        owners = list(dict.fromkeys(request for request, _ in refs))
        other = dict(zip(owners, [*owners[1:], owners[0]], strict=True))
        return [
            RowSet(each.kind, [{**row, "request_id": other[row["request_id"]]} for row in each.rows])
            for each in original(runner, refs, known)
        ]

    row_scopes.item_sets = swapped


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    say_and_end(main(*sys.argv[1:]))
