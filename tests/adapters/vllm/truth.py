"""What the rows of requests are, as transformers computes them in float32, and what is wrong with a run's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase as fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tlcore
from tlcore.errors import MissingError
from tlcore.reader import Request, Run

_LAST = -1


class Names(NamedTuple):
    """The names of what a run is held against: token ids, states behind the norm, logits; and of a layer."""

    ids: str = "model.embed_tokens/inputs_0_cpu"
    hidden: str = "model.norm/outputs_0_cpu"
    logits: str = "logits_processor/outputs_cpu"
    layer: str = "model.layers.2/outputs_0"


OF_VLLM, OF_TRANSFORMERS = Names(), Names(hidden="model.norm/outputs_cpu", layer="model.layers.2/outputs")
# A speculator's tensor of the target's states: its name, how far ahead its token ids are, which columns are
# the states, and of which of transformers' hidden states.
STATES: dict[str, tuple[str, int, slice, int]] = {
    "eagle": ("draft.model.fc/inputs_0_cpu", 1, slice(128, 256), _LAST),
    "eagle3": ("draft.model.fc/inputs_0_cpu", 1, slice(256, 384), 3),
    "dflash": ("draft.model.fc/inputs_0_cpu", 0, slice(256, 384), 3),
    "medusa": ("draft.blocks.0/inputs_0_cpu", 0, slice(None), _LAST),
    "mtp": ("draft.model.layers.2.hnorm/inputs_0_cpu", 1, slice(None), _LAST),
    "extract_hidden_states": ("draft.cache_only_layers.4/inputs_0_cpu", 0, slice(None), 1),
    "draft_model": ("draft.model.embed_tokens/outputs_cpu", 0, slice(None), 0),
}


def of_rank(request: Request, name: str) -> str:
    """The name under which some rank has a tensor: of a pipeline only the last has the model's end."""
    return name if name in request else f"{name}_rank_1"


class Truth:
    """A checkpoint's own states and logits, and the ``names`` that a run has for them."""

    def __init__(self, checkpoint: Path, names: Names = OF_VLLM) -> None:
        self._checkpoint = checkpoint
        self.names = names

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(self._checkpoint), dtype=torch.float32)

    def of(self, tokens: Sequence[int]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The hidden states of each layer and the logits, a row for each position."""
        with torch.inference_mode():
            found = self._model(torch.tensor([tokens]), output_hidden_states=True)
        return tuple(each[0] for each in found.hidden_states), found.logits[0]

    def agrees(self, rows: torch.Tensor, tokens: Sequence[int], positions: list[int], layer: int) -> bool:
        """Whether rows are a layer's states at these positions."""
        return bool(positions) and _close(rows, self.of(tokens)[0][layer][positions])


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=2e-4, rtol=2e-3)


def wrong_rows(
    request: Request,
    tokens: Sequence[int],
    truth: Truth,
    prompt: int | None = None,
    further: bool = False,
) -> list[str]:
    """What is wrong with a request's rows, of which ``tokens`` are known.

    With the length of its ``prompt``, also what is missing. It may have ``further`` tokens that nobody knows.
    """
    states, logits = truth.of(tokens)
    names = truth.names
    wanted: dict[str, torch.Tensor] = {
        names.ids: torch.tensor(tokens), names.hidden: states[_LAST], names.logits: logits
    }  # fmt: skip
    for name in request:
        if name.startswith("logits_processor_") and name.endswith("outputs_cpu"):
            wanted[name] = logits
    wanted |= {f"{name}_rank_1": true for name, true in wanted.items()}
    found = []
    for name, true in wanted.items():
        if name not in request:
            continue
        positions = request.positions(name)
        if positions != sorted(set(positions)) or (positions[-1] >= len(tokens) and not further):
            found.append(f"{name}: positions {positions} of {len(tokens)} tokens")
            continue
        inside = [place for place, position in enumerate(positions) if position < len(tokens)]
        if not _close(request[name][inside].float(), true[[positions[i] for i in inside]].float()):
            found.append(f"{name}: not the rows of positions {positions}")
    return found if prompt is None else [*found, *_missing(request, names, len(tokens), prompt)]


def _missing(
    request: Request, names: Names, tokens: int, prompt: int, wanted: Collection[int] | None = None
) -> Iterator[str]:
    """Rows that are not there, of all positions or those that are ``wanted``."""
    cached = {
        position
        for gap in (request.gaps(names.ids) if names.ids in request else ())
        if gap.reason == "prefix cache"
        for position in range(gap.begin, gap.end)
    }
    for name, begin in ((names.ids, 0), (names.hidden, 0), (names.logits, prompt - 1)):
        own = of_rank(request, name)
        there = set(request.positions(own)) if own in request else set()
        lacking = set(range(begin, tokens - 1)) - there - cached
        if wanted is not None:
            lacking &= set(wanted)
        if lacking:
            yield f"{name}: no rows of positions {sorted(lacking)}"


def complaints(mix: Mapping[str, Any], truth: Truth) -> list[str]:
    """What is wrong with the run of a random mix of requests."""
    run = tlcore.open_run(mix["url"])
    if mix["beams"]:
        # What a beam that was given up had, only the run tells.
        own = [run.request(each) for each in run.requests]
        return [text for each in own for text in wrong_rows(each, each.token_ids.tolist(), truth)]
    return [text for asked in mix["asked"] for text in _of_one(run, asked, mix["keys"], truth)]


def _of_one(run: Run, asked: Mapping[str, Any], keys: Mapping[str, Any], truth: Truth) -> Iterator[str]:
    name, prompt, aborted = asked["name"], asked["prompt"], asked["abort_after"] is not None
    choice = asked["tlcore"]
    chosen = "request_ids" not in keys or name.endswith((".0", ".2"))
    if choice is not None or keys.get("log_step_ids"):
        chosen = choice is not None and choice.get("enabled") is not False
    for sample, tokens in enumerate(asked["tokens"]):
        wanted = _wanted(keys, choice or {}, len(prompt), len(tokens))
        try:
            request = run.request(name) if asked["samples"] == 1 else run.request(name, sample=sample)
        except MissingError:
            # One that was taken back may never have run, and of one whose rows were cached there may be none.
            if chosen and not aborted and wanted and "rows" not in {**keys, **(choice or {})}:
                yield f"{name} is missing"
            continue
        if not chosen:
            yield f"{name} was not asked for"
        for text in _unwanted(request, keys, choice or {}, len(prompt)):
            yield f"{name}, sample {sample}: {text}"
        modules = (choice or {}).get("modules")
        whole = len(prompt) if not aborted and keys.get("rows") != "last" and modules is None else None
        for text in wrong_rows(request, [*prompt, *tokens], truth, further=aborted):
            yield f"{name}, sample {sample}: {text}"
        if whole:
            for text in _missing(request, truth.names, len(prompt) + len(tokens), whole, wanted):
                yield f"{name}, sample {sample}: {text}"


def _wanted(keys: Mapping[str, Any], choice: Mapping[str, Any], prompt: int, tokens: int) -> set[int]:
    """The positions that the run's window and the request's own leave, of those that are computed."""
    found = set(range(prompt + tokens - 1))
    for rows in (keys.get("rows"), choice.get("rows")):
        begin, end = _ends(rows, prompt)
        found = {each for each in found if begin <= each and (end is None or each < end)}
    return found


def _ends(rows: Any, prompt: int) -> tuple[int, int | None]:
    named = {None: (0, None), "last": (0, None), "prompt": (0, prompt), "response": (prompt, None)}
    if not isinstance(rows, dict):
        return named[rows]

    def place(end: Any) -> int:
        return prompt if end == "prompt" else end if end >= 0 else max(0, prompt + end)

    return place(rows.get("from", 0)), place(rows["to"]) if "to" in rows else None


def _unwanted(
    request: Request, keys: Mapping[str, Any], choice: Mapping[str, Any], prompt: int
) -> Iterator[str]:
    """Rows outside the windows, and modules that the request has not chosen."""
    for name in request:
        for rows in (keys.get("rows"), choice.get("rows")):
            begin, end = _ends(rows, prompt)
            outside = [
                each for each in request.positions(name) if each < begin or (end is not None and each >= end)
            ]
            if outside:
                yield f"{name}: positions {outside} are none of {rows}"
        modules = choice.get("modules")
        if modules is not None and not any(fnmatch(name.partition("/")[0], each) for each in modules):
            yield f"{name} is none of {modules}"
