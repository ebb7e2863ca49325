"""Train a sparse autoencoder on the residual stream of one layer, straight from where it was captured.

The prompts go through SmolLM2-135M (`--model` takes another one of transformers) while the outputs of a layer
are captured to `--output-dir`, a directory or a bucket (`s3://...`). The training reads them back from there,
shuffled, and the loss is plotted. Needs transformers and matplotlib. On two cores it takes ten minutes or
more, in small (`--prompts 96 --layer 5 --epochs 6 --batch-size 128`) about one.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import tlcore
from tlcore.reader import Run

WHO = ("A chemist", "My neighbour", "The captain", "A painter", "The court", "Every farmer", "The committee")
WHAT = ("measured", "forgot", "described", "repaired", "refused", "translated", "counted", "celebrated")
WHOM = ("the bridge", "a letter", "seven stars", "the price of bread", "an argument", "his garden", "the law")
WHEN = ("in the winter", "before the war", "at noon", "without a reason", "twice", "on a Sunday", "as always")

# Prompts that go through the model together.
_TOGETHER = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Capture, train, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint's directory or name; SmolLM2-135M by default")
    parser.add_argument("--output-dir", default="/tmp/tlcore_autoencoder", help="for the run; a path or URL")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1024, help="tokens")
    parser.add_argument("--plot", default="sparse_autoencoder.png", help="the picture of the loss")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    run, name = collect(args.model or default_model(), args.output_dir, args.layer, args.prompts)
    # The first token of a text has a state of its own kind, many times larger than any other.
    data = run.dataset(name, rows={"from": 1})
    print(f"{run.url}: {len(data)} tokens of {len(data.requests)} prompts")
    losses = train(data.loader(args.batch_size, seed=0), data[0][name].numel(), name, args.epochs)
    print(f"unexplained variance: {losses[0]:.3f} at first, {losses[-1]:.3f} in the end")
    plot(losses, args.plot)


def default_model() -> str:
    """The SmolLM2-135M checkpoint that the tests use too."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        from tests.models import smollm2
    except ImportError:
        sys.exit("outside of a checkout of tlcore there is no model at hand: name one by --model")

    return str(smollm2())


def sentences(count: int) -> list[str]:
    """So many different sentences."""
    every = itertools.cycle(itertools.product(WHO, WHAT, WHOM, WHEN))
    # Neighbours have little in common.
    return [f"{' '.join(parts)}." for parts in itertools.islice(every, 0, count * 101, 101)]


def collect(model_name: str, output_dir: str, layer: int, prompts: int) -> tuple[Run, str]:
    """Capture the outputs of a layer; returns the run, and the tensor's name without its step."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16).eval()
    pattern = f"^{re.escape(layer_name(model, layer))}$"
    keys: dict[str, Any] = {"output_dir": output_dir, "backend": "safetensors", "log_step_ids": []}
    with torch.inference_mode(), tlcore.capture(model, module_call_match=pattern, **keys) as capture:
        for number, batch in enumerate(batches(tokenizer, sentences(prompts)), 1):
            model(**batch)
            print(f"\r{min(number * _TOGETHER, prompts)} of {prompts} prompts", end="", file=sys.stderr)
    print(file=sys.stderr)
    run = tlcore.open_run(capture.url)
    outputs = (name.partition("/")[2] for name in run.step(0).names if "/outputs" in name)
    return run, next(outputs)


def layer_name(model: nn.Module, layer: int) -> str:
    """The module of a layer by its number: ``model.layers.3`` of a Llama, another name elsewhere."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    name = max(lists, key=lambda each: len(lists[each]), default="")
    count = len(lists[name]) if name else 0
    if not 0 <= layer < count:
        sys.exit(f"the model has {count} layers, numbered from 0: name one of them by --layer")
    return f"{name}.{layer}"


def batches(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Texts of a batch are padded; tlcore leaves the padding out."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for begin in range(0, len(texts), _TOGETHER):
        yield dict(tokenizer(texts[begin : begin + _TOGETHER], return_tensors="pt", padding=True))


class SparseAutoencoder(nn.Module):
    """Explains a state by the few directions, of many, that it has most of."""

    def __init__(self, size: int, directions: int, active: int) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(size, directions), nn.Linear(directions, size)
        self.decode.weight.data = self.encode.weight.data.T.clone()
        self.active = active

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The states again, as far as they are explained."""
        strengths = self.encode(states - self.decode.bias).relu()
        most = strengths.topk(self.active)
        found: torch.Tensor = self.decode(torch.zeros_like(strengths).scatter(-1, most.indices, most.values))
        return found


def train(loader: Iterable[dict[str, torch.Tensor]], size: int, name: str, epochs: int) -> list[float]:
    """The share of the variance that each step's batch was left with."""
    model = SparseAutoencoder(size, 8 * size, 32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for epoch in range(1, epochs + 1):
        for batch in loader:
            states = batch[name].float()
            states = states / states.std()
            loss = (model(states) - states).square().mean() / states.var(0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: {losses[-1]:.3f} of the variance is unexplained")
    return losses


def plot(losses: Sequence[float], path: str) -> None:
    """Draw the loss over the steps."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses)
    axes.set(xlabel="step", ylabel="unexplained variance", ylim=(0, None))
    figure.savefig(path)
    print(f"plotted: {path}")


if __name__ == "__main__":
    main()
