"""A checkpoint that transformers runs once over given tokens, captured.

``python -m tlcore.adapters.again DIRECTORY`` does it in a process of its own (`tlcore.adapters.processes`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..engine.capture import capture
from ..record import Json
from .processes import answer
from .reference import padded


def main(settings: Json, directory: Path) -> Json:
    """Capture one call with all prompts, padded behind, where no row of theirs looks; the run's URL."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=settings["dtype"] or "auto", **settings["arguments"]
    ).eval()
    ids, mask = padded(settings["prompts"], model.device)
    with torch.inference_mode(), capture(model, **settings["config"]) as captured:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return {"url": captured.url}


if __name__ == "__main__":
    answer(main)
