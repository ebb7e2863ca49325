"""What two runs say in ``run.json`` that they were made with: software, devices, configuration, weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..reader import Run
from ..reader.injected import overflowed

_SHOWN = 3
_NEVER_PACKED = re.compile(r"norm|embed|bias$")
# Of an engine's settings those that change nothing but how the same is rounded.
_KERNELS = ("compilation", "cudagraphs", "custom_ops", "attention")


def settings_apart(a: Run, b: Run) -> Iterator[str]:
    """What of packages, settings and devices differs: other rounding comes of it, and nothing else should."""
    for part in ("packages", "settings", "engine", "devices"):
        mine, other = (part_of(run, part) for run in (a, b))
        if mine and other:
            yield from (f"{key} ({one} against {two})" for key, one, two in _differing(mine, other))


def other_kernels(a: Run, b: Run) -> list[str]:
    """What two runs of vLLM differ in that lets other kernels compute the same: one is compiled, say."""
    mine, other = part_of(a, "engine"), part_of(b, "engine")
    if not mine or not other:
        return []
    return [f"{key} ({one} against {two})" for key, one, two in _differing(mine, other) if key in _KERNELS]


def causes(a: Run, b: Run) -> list[str]:
    """Notes on what makes two models give other values: their configurations and their weights."""
    notes = []
    configurations = [part_of(run, "configuration") for run in (a, b)]
    if all(configurations):
        found = [f"{key} ({one} against {two})" for key, one, two in _differing(*configurations)]
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            notes.append(f"the models' configurations differ: {', '.join(found[:_SHOWN])}{more}")
    mine, other = (part_of(run, "weights").get("tensors") for run in (a, b))
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        notes += _weights_apart(mine, other, packs_weights(a) != packs_weights(b))
    return notes


def injections(runs: tuple[Run, Run]) -> Iterator[str]:
    """Notes on runs into which results of others were injected, and on what did not fit there."""
    for label, run in zip("AB", runs, strict=True):
        if run.injected is None:
            continue
        yield f"{label} was {run.injection}"
        beyond: Counter[str] = Counter()
        for number in run.steps:
            beyond.update(overflowed(run.step(number)))
        for what, count in beyond.items():
            yield (
                f"{label}: {count} injected results have numbers beyond the range, {what}, and are infinite "
                "or NaN there: what follows them tells nothing of either model"
            )


def packs_weights(run: Run) -> bool:
    """Whether a run is of vLLM, which puts weights of linear layers in the order of its kernels."""
    environment = run.document.get("environment")
    model = environment.get("model") if isinstance(environment, Mapping) else None
    return isinstance(model, str) and (model.startswith("vllm.") or bool(part_of(run, "engine")))


def _weights_apart(a: Mapping[str, Any], b: Mapping[str, Any], one_packs: bool) -> Iterator[str]:
    """What of the tensors that both models have in one dtype; those of two dtypes differ anyway.

    Where only ``one_packs`` them, those of linear layers may be the same in another order: all others tell.
    """
    both = [name for name in a if name in b and str(a[name]).split()[:1] == str(b[name]).split()[:1]]
    if one_packs:
        both = [name for name in both if _NEVER_PACKED.search(name)]
    found = [name for name in both if a[name] != b[name]]
    if found:
        shown = ", ".join(found[:_SHOWN])
        yield f"the models' weights differ in {len(found)} of {len(both)} tensors, such as {shown}"


def part_of(run: Run, name: str) -> Mapping[str, Any]:
    """What a run says of a thing that it was made with, such as ``weights``; empty where it says nothing."""
    environment = run.document.get("environment")
    found = environment.get(name) if isinstance(environment, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key in {**a, **b}:
        if a.get(key) != b.get(key):
            yield key, _short(a.get(key)), _short(b.get(key))


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
