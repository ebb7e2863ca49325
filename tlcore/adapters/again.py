"""A checkpoint that transformers runs once over given tokens, captured.

``python -m tlcore.adapters.again DIRECTORY`` does it in a process of its own (`tlcore.adapters.processes`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..analysis.replay.checkpoints import pretrained
from ..engine.capture import capture
from ..record import Json
from .processes import answer
from .reference import padded


def main(settings: Json, directory: Path) -> Json:
    """Capture one call with all prompts, padded behind, where no row of theirs looks; the run's URL."""
    arguments = {"dtype": settings["dtype"] or "auto", **settings["arguments"]}
    model: Any = pretrained(settings["model"], settings.get("of"), arguments).eval()
    given = dict(zip(("input_ids", "attention_mask"), padded(settings["prompts"], model.device), strict=True))
    if settings.get("encoded"):
        ids, mask = padded(settings["encoded"], model.device)
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            **{f"decoder_{key}": each for key, each in given.items()},
        }
    with torch.inference_mode(), capture(model, **settings["config"]) as captured:
        model(**given, use_cache=False)
    return {"url": captured.url}


if __name__ == "__main__":
    answer(main)
