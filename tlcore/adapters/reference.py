"""What transformers makes of tokens, behind each layer of a checkpoint: by plain hooks, and captured.

``python -m tlcore.adapters.reference DIRECTORY`` does it in a process of its own
(`tlcore.adapters.processes`). The hooks are torch's, since what capture says is what is to be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..analysis.selftest.layers import layer_numbers
from ..engine.capture import capture
from ..record import Json
from .processes import answer

FILE = "reference.safetensors"


def main(settings: Json, directory: Path) -> Json:
    """Write the rows of the sequences by layer, and capture the prompts in one batch."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True} if settings["trust_remote_code"] else {}
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype, **options).eval()
    with torch.inference_mode():
        save_file(_rows(model, settings["sequences"]), directory / FILE)
        url = _captured(model, settings["prompts"], settings["modules"], str(directory / "runs"))
    requests = [
        {"id": str(place), "tokens": prompt, "prompt": len(prompt)}
        for place, prompt in enumerate(settings["prompts"])
    ]
    return {"ways": {"transformers": {"url": url, "requests": requests}}}


def _rows(model: Any, sequences: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """By layer's number, a row for each token of each sequence, one sequence after the other."""
    shown: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            shown.setdefault(name, []).append(rows[0].clone())

        return hook

    names = layer_numbers(name for name, _ in model.named_modules())
    handles = [
        module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name in names
    ]
    for tokens in sequences:
        model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {str(names[name]): torch.cat(rows) for name, rows in shown.items()}


def padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of one batch, padded behind, where no row of theirs looks."""
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


def _captured(model: Any, prompts: Sequence[list[int]], modules: list[str], output_dir: str) -> str:
    """The URL of a run of one batch."""
    ids, mask = padded(prompts, model.device)
    with capture(
        model,
        output_dir=output_dir,
        module_call_match=modules,
        log_step_ids=[],
        backend="safetensors",
        step="outermost",
    ) as captured:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return captured.url


if __name__ == "__main__":
    answer(main)
