"""A linear probe on the last token of each prompt: does the model know in a layer whether a review is good?

Only the last row of each prompt is captured (`"rows": "last"`), of the layers that are asked for. The probe
of each layer learns on some words, and is tried on others that it has never seen.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tlcore
from tlcore.reader import Run

GOOD = ("wonderful", "brilliant", "delightful", "superb", "charming", "excellent", "moving", "clever")
BAD = ("terrible", "boring", "dreadful", "awful", "clumsy", "disappointing", "annoying", "stupid")
WHAT = ("film", "novel", "concert", "restaurant", "lecture", "game", "play", "hotel")
TEXTS = ("I found the {what} {word}", "What a {word} {what}", "The {what} was really {word}")
# Words of each kind that the probe does not learn from.
_HELD_BACK = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Capture, train a probe a layer, print how often each is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint's directory or name; SmolLM2-135M by default")
    parser.add_argument("--output-dir", default="/tmp/tlcore_probe", help="for the run; a path or URL")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 8, 16, 24])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    texts, labels, learnt = prompts()
    run = collect(args.model or default_model(), args.output_dir, args.layers, texts)
    for layer in args.layers:
        states = last_states(run, layer, len(texts))
        right = probe(states, labels, learnt, args.steps)
        print(f"layer {layer}: {right:.0%} of {int((~learnt).sum())} prompts with other words are told right")


def default_model() -> str:
    """The SmolLM2-135M checkpoint that the tests use too."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        from tests.models import smollm2
    except ImportError:
        sys.exit("outside of a checkout of tlcore there is no model at hand: name one by --model")

    return str(smollm2())


def prompts() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Texts, whether each is good ``[prompts]``, and whether the probe learns from it ``[prompts]``."""
    texts, labels, learnt = [], [], []
    for label, words in ((1.0, GOOD), (0.0, BAD)):
        for (place, word), what, text in itertools.product(enumerate(words), WHAT, TEXTS):
            texts.append(text.format(word=word, what=what))
            labels.append(label)
            learnt.append(place >= _HELD_BACK)
    return texts, torch.tensor(labels), torch.tensor(learnt)


def collect(model_name: str, output_dir: str, layers: Sequence[int], texts: Sequence[str]) -> Run:
    """Capture the outputs of layers at the last token of each text."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16).eval()
    patterns = [f"^{re.escape(name)}$" for name in layer_names(model, layers)]
    keys: dict[str, Any] = {
        "output_dir": output_dir,
        "backend": "safetensors",
        "log_step_ids": [],
        "rows": "last",
    }
    with torch.inference_mode(), tlcore.capture(model, module_call_match=patterns, **keys) as capture:
        for begin in range(0, len(texts), 32):
            model(**tokenizer(list(texts[begin : begin + 32]), return_tensors="pt", padding=True))
    return tlcore.open_run(capture.url)


def layer_names(model: nn.Module, layers: Sequence[int]) -> list[str]:
    """The modules of layers by number: ``model.layers.3`` of a Llama, others elsewhere."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    name = max(lists, key=lambda each: len(lists[each]), default="")
    if not name or not 0 <= min(layers) <= max(layers) < len(lists[name]):
        count = len(lists[name]) if name else 0
        sys.exit(f"the model has {count} layers, numbered from 0: name some of them by --layers")
    return [f"{name}.{layer}" for layer in layers]


def last_states(run: Run, layer: int, count: int) -> torch.Tensor:
    """The state of each prompt's last token, ``[prompts, width]``, in the order of the prompts."""
    outputs = re.compile(rf"step_\d+/(.*\.{layer}/outputs(_0)?)_cpu")
    (name,) = (known[1] for known in map(outputs.fullmatch, run.step(0).names) if known)
    data = run.dataset(name)
    assert len(data) == count, data.left_out
    found: dict[int, torch.Tensor] = {}
    for item in data:
        # Samples are numbered in the order in which the model got them.
        found[int(data.requests[int(item["request"])])] = item[name].float()
    return torch.stack([found[number] for number in range(count)])


def probe(states: torch.Tensor, labels: torch.Tensor, learnt: torch.Tensor, steps: int) -> float:
    """Learn a linear probe; how often it is right about what it has not learnt from."""
    states = (states - states[learnt].mean(0)) / states[learnt].std(0).clamp(min=1e-3)
    model = nn.Linear(states.shape[1], 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1.0)
    for _ in range(steps):
        told = model(states[learnt])[:, 0]
        loss: Any = nn.functional.binary_cross_entropy_with_logits(told, labels[learnt])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        said = model(states[~learnt])[:, 0] > 0
    return float((said == labels[~learnt].bool()).float().mean())


if __name__ == "__main__":
    main()
