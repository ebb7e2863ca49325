"""Random mixes of requests on a stand-in for vLLM's model runner, whose tensors say whose each row is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.sinks import MemorySink
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.layout.grids import as_rows
from tlcore.layout.rows import CallRows, Span

VOCABULARY = 1000
Plant = Callable[[list[dict[str, Any]]], None]


@dataclass
class Asked:
    """A request: its number and tokens so far (the prompt first), and how many of them are computed."""

    number: int
    tokens: list[int]
    prompt: int
    longest: int
    logprobs: bool
    computed: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The id that vLLM would give it."""
        return f"{self.number}-0123abcd"


class Model(nn.Module):
    """Hands on rows that consist of the request's number, the position and the token."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.logits_processor = nn.Identity()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(rows)
        return found

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.logits_processor(states)
        return found


class OfTransformers(Model):
    """Gives its layer the rows as a batch of one sample, as vLLM does where it runs transformers' code."""

    __module__ = "vllm.model_executor.models.transformers.causal"

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(rows[None])
        return found[0]


class Runner:
    """Runs batches as vLLM's first model runner does, with its names."""

    def __init__(self, speculates: bool, batched: bool) -> None:
        self.model = OfTransformers() if batched else Model()
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(prefill_context_parallel_size=1))
        self.speculative_config = object() if speculates else None
        self.max_model_len = 10_000
        self.num_prompt_logprobs: dict[str, int] = {}
        self.requests: dict[str, Any] = {}
        self.input_batch: Any = None
        self.sampled: dict[str, list[int]] = {}

    def get_model(self) -> nn.Module:
        return self.model

    def _prepare_inputs(self, scheduled: Any, counts: Any) -> None:
        """What the reader of the rows looks at is set by `execute_model`."""

    def _preprocess(self, scheduled: Any) -> None:
        """Where vLLM encodes images; here are none."""

    def _model_forward(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(rows)
        return found

    def _get_prompt_logprobs_dict(self, hidden: torch.Tensor, counts: Any) -> None:
        for name in self.num_prompt_logprobs:
            first, count = self.parts[name]
            if count:
                self.model.compute_logits(hidden[first : first + count])

    def execute_model(self, scheduled: Any) -> None:
        batch: list[Asked] = scheduled.batch
        counts = [scheduled.num_scheduled_tokens[each.name] for each in batch]
        starts = np.cumsum([0, *counts])
        self.input_batch = SimpleNamespace(
            req_ids=[each.name for each in batch],
            num_computed_tokens_cpu=np.array([each.computed for each in batch]),
        )
        self.query_start_loc = SimpleNamespace(np=starts)
        fed = [
            (*each.tokens, *each.drafts)[each.computed : each.computed + n]
            for each, n in zip(batch, counts, strict=True)
        ]
        rows = [
            (each.number, each.computed + i, token)
            for each, tokens in zip(batch, fed, strict=True)
            for i, token in enumerate(tokens)
        ]
        padded = rows + [(-1, -1, -1)] * scheduled.padded
        self.positions = torch.tensor([position for _, position, _ in padded])
        self._prepare_inputs(scheduled, None)
        self._preprocess(scheduled)
        states = self._model_forward(torch.tensor(padded, dtype=torch.float32), positions=self.positions)
        indices = [
            end - 1 - back
            for each, end in zip(batch, starts[1:], strict=True)
            for back in range(len(scheduled.scheduled_spec_decode_tokens.get(each.name, ())), -1, -1)
        ]
        self.model.compute_logits(states[indices])
        self.parts = {
            each.name: (int(first), max(0, min(n, each.prompt - 1 - each.computed)))
            for each, first, n in zip(batch, starts, counts, strict=False)
            if each.logprobs
        }
        self.num_prompt_logprobs = dict.fromkeys(self.parts, 0)
        self.hidden = states[: len(rows)]
        self.requests = {
            each.name: SimpleNamespace(
                num_prompt_tokens=each.prompt,
                sampling_params=SimpleNamespace(
                    max_tokens=each.longest,
                    eos_token_id=None,
                    stop_token_ids=(),
                    min_tokens=0,
                    repetition_detection=None,
                ),
            )
            for each in batch
        }

    def sample_tokens(self, grammar: Any) -> Any:
        self._get_prompt_logprobs_dict(self.hidden, None)
        names = list(self.sampled)
        return SimpleNamespace(req_ids=names, sampled_token_ids=[self.sampled[name] for name in names])


def run_mix(seed: int, plant: Plant | None = None, **keys: Any) -> tuple[list[Asked], MemorySink]:
    """Capture a random mix of requests until all have ended; ``plant`` spoils the rows of each step."""
    chance = random.Random(seed)
    speculates = chance.random() < 0.6
    runner, sink = Runner(speculates, chance.random() < 0.4), MemorySink()
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused", **keys})
    session = Session(config, new_run(config), sink, inline=True)
    session.attach(runner.model)
    wrapper = StepWrapper(session, runner)
    if plant is not None:
        original = wrapper._reader.rows

        def rows(scheduled: Any) -> list[dict[str, Any]]:
            found = original(scheduled)
            plant(found)
            return found

        vars(wrapper._reader)["rows"] = rows
    asked = [
        Asked(
            number,
            [chance.randrange(VOCABULARY) for _ in range(size)],
            size,
            chance.randint(1, 12),
            chance.random() < 0.3,
        )
        for number, size in enumerate(chance.randint(1, 20) for _ in range(chance.randint(1, 6)))
    ]
    for scheduled in _schedule(asked, chance, speculates):
        runner.execute_model(scheduled)
        runner.sampled = _sample(scheduled, chance)
        runner.sample_tokens(None)
        _settle(scheduled, runner.sampled)
    session.close()
    assert session.ledger.balanced
    return asked, sink


def _schedule(asked: list[Asked], chance: random.Random, speculates: bool) -> Iterator[Any]:
    while running := [each for each in asked if len(each.tokens) - each.prompt < each.longest]:
        batch = chance.sample(running, chance.randint(1, len(running)))
        counts, drafts = {}, {}
        for each in batch:
            if each.computed > each.prompt and chance.random() < 0.05:
                # Preempted: everything is computed again.
                each.computed = 0
            left = len(each.tokens) - each.computed
            each.drafts = []
            if speculates and left == 1:
                each.drafts = [chance.randrange(VOCABULARY) for _ in range(chance.randint(0, 4))]
                drafts[each.name] = each.drafts
            counts[each.name] = chance.randint(1, left) if left > 1 else left + len(each.drafts)
        yield SimpleNamespace(
            batch=batch,
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            scheduled_spec_decode_tokens=drafts,
            padded=chance.choice([0, 0, 1, 3]),
        )


def _sample(scheduled: Any, chance: random.Random) -> dict[str, list[int]]:
    found = {}
    for each in scheduled.batch:
        ends = each.computed + scheduled.num_scheduled_tokens[each.name] - len(each.drafts)
        kept = each.drafts[: chance.randint(0, len(each.drafts))]
        found[each.name] = [*kept, VOCABULARY + chance.randrange(9)] if ends == len(each.tokens) else []
    return found


def _settle(scheduled: Any, sampled: dict[str, list[int]]) -> None:
    for each in scheduled.batch:
        new = sampled[each.name][: each.longest - (len(each.tokens) - each.prompt)]
        fed = scheduled.num_scheduled_tokens[each.name] - len(each.drafts)
        each.computed += fed + max(0, len(sampled[each.name]) - 1)
        each.tokens += new


def complaints(asked: list[Asked], sink: MemorySink) -> list[str]:
    """What is wrong with whose rows the run says are whose."""
    found: list[str] = []
    seen: dict[tuple[int, str], set[int]] = {}
    tokens = {each.name: each for each in asked}
    for step in sink.steps:
        rows = CallRows(step.to_json(()))
        for name, tensor in sink.tensors.items():
            if name.startswith(f"step_{step.step}/") and name.endswith("outputs_cpu"):
                record = {"name": name, "shape": list(tensor.shape), "dtype": "float32"}
                for span in map(Span.kept, rows.spans(record)):
                    found += _wrong(name, tensor, span, tokens[str(span.row["request_id"])], seen)
    for each in asked:
        fed = set(range(max(each.prompt, len(each.tokens) - 1)))
        if not fed <= seen.get((each.number, "layer"), set()):
            found.append(f"positions of {each.name} are missing")
    return found


def _wrong(
    name: str, tensor: torch.Tensor, span: Span, owner: Asked, seen: dict[tuple[int, str], set[int]]
) -> Iterator[str]:
    assert span.first is not None
    for i in range(span.length):
        position = span.first + i
        seen.setdefault((owner.number, name.split("/")[1]), set()).add(position)
        true = owner.tokens[position] if position < len(owner.tokens) else None
        if as_rows(tensor, span.axis)[span.begin + i].tolist() != [owner.number, position, true]:
            yield f"{name}: row {span.begin + i} is not position {position} of {owner.name}"
