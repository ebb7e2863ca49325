"""Random mixes of requests in a real engine: aborts, samples, beams, prompt logits, structured output.

Each mix is captured in a run of its own. What a mix asked for is told as JSON data.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

from tests.fuzz.plants import PLANTS, Rows

VOCABULARY, LONGEST = 512, 40
# Which requests and rows are stored, with how often.
_CHOSEN = {"request_ids": r"\.[02]-"}
_WINDOWS: list[Any] = [
    "prompt",
    "response",
    {"from": -3, "to": 12},
    {"from": 2, "to": "prompt"},
    {"from": -40, "to": -1},
    {"from": 20},
]
_KEYS: list[dict[str, Any]] = [{}, {}, {}, {"rows": "last"}, {"rows": "response"}, _CHOSEN]
_MORE_KEYS = [*_KEYS[2:], *({"rows": rows} for rows in _WINDOWS)]
# What requests choose for themselves, of runs that let them.
_OVERRIDES = {"request_overrides": ["enabled", "modules", "rows"]}
_CHOICES: list[Any] = [
    None,
    {"enabled": False},
    {"enabled": False, "rows": "prompt"},
    {"enabled": True},
    {"modules": ["*embed_tokens", "model.norm"]},
    *({"rows": rows} for rows in _WINDOWS),
    {"rows": "response", "modules": ["model.norm"]},
]


@dataclass
class Asked:
    """A request: its id, its prompt, the samples' tokens so far, and what is special about it."""

    name: str
    prompt: list[int]
    samples: int
    longest: int
    arrival: int
    abort_after: int | None
    prompt_logprobs: bool
    choice: bool
    tlcore: Any
    tokens: list[list[int]]

    def sampling(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        choice = StructuredOutputsParams(choice=["the quick fox", "a lazy dog"]) if self.choice else None
        return SamplingParams(
            n=self.samples,
            temperature=1.0 if self.samples > 1 else 0.0,
            max_tokens=self.longest,
            ignore_eos=not self.choice,
            prompt_logprobs=0 if self.prompt_logprobs else None,
            structured_outputs=choice,
            extra_args=None if self.tlcore is None else {"tlcore": self.tlcore},
        )


def run_mix(llm: Any, output_dir: str, seed: int, plant: str | None = None) -> dict[str, Any]:
    """Capture one mix; with a ``plant`` that fault is in the rows of each step."""
    import tlcore.vllm

    chance = random.Random(seed)
    speculates = llm.llm_engine.vllm_config.speculative_config is not None
    # With a draft model, whose rows have positions of their own, and in several engines only the usual ones.
    windows = hasattr(llm, "beam_search") and (not speculates or _method(llm) == "ngram")
    keys = {} if plant else dict(chance.choice(_MORE_KEYS if windows else _KEYS))
    chooses = windows and plant is None and keys.get("rows") != "last" and chance.random() < 0.5
    if chooses:
        # None of those who choose nothing is captured where no step is selected.
        keys |= {**_OVERRIDES, "log_step_ids": chance.choice([[], [10**6]])}
    changes = 0
    with tlcore.vllm.attach(
        llm,
        output_dir=output_dir,
        module_call_match=[r"embed_tokens$", r"model\.norm$", "logits"],
        backend="safetensors",
        **{"log_step_ids": [], **keys},
    ) as attached:
        if plant:
            llm.collective_rpc(_plant, args=(plant,))
        beams = chance.random() < 0.15 and not speculates and plant is None and hasattr(llm, "beam_search")
        asked = [] if beams else _asked(chance, seed, speculates, plant is None, chooses)
        if beams:
            _search(llm, chance)
        else:
            _run(llm, asked)
        if plant:
            changes = max(llm.collective_rpc(_uproot))
    found = {"url": attached.url, "keys": keys, "beams": beams, "plant": plant, "changes": changes}
    return {**found, "seed": seed, "asked": [asdict(each) for each in asked]}


def _method(llm: Any) -> str:
    return str(llm.llm_engine.vllm_config.speculative_config.method)


def _asked(chance: random.Random, seed: int, speculates: bool, aborts: bool, chooses: bool) -> list[Asked]:
    found: list[Asked] = []
    for place in range(chance.randint(1, 7)):
        prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, LONGEST))]
        if found and chance.random() < 0.3:
            # The beginning of another one's, for the prefix cache.
            prompt = found[-1].prompt[: chance.randint(1, LONGEST)] + prompt[:5]
        if speculates:
            # Repetition, for a speculator to find.
            prompt = prompt + prompt[-4:] * 2
        samples = chance.choice([1, 1, 1, 2])
        found.append(
            Asked(
                name=f"mix{seed}.{place}",
                prompt=prompt,
                samples=samples,
                longest=chance.randint(1, 16),
                arrival=chance.randint(0, 6),
                abort_after=chance.randint(1, 6) if chance.random() < 0.2 and aborts else None,
                prompt_logprobs=chance.random() < 0.3 and not speculates,
                choice=chance.random() < 0.2,
                tlcore=chance.choice(_CHOICES) if chooses else None,
                tokens=[[] for _ in range(samples)],
            )
        )
    return found


def _run(llm: Any, asked: list[Asked]) -> None:
    """Put requests in when it is their turn, and take some out again."""
    engine, by_name = llm.llm_engine, {each.name: each for each in asked}
    turn = 0
    while turn <= 6 or engine.has_unfinished_requests():
        for each in asked:
            if each.arrival == turn:
                engine.add_request(each.name, {"prompt_token_ids": each.prompt}, each.sampling())
            if each.abort_after is not None and each.arrival + each.abort_after == turn:
                engine.abort_request([each.name])
        for output in engine.step() if engine.has_unfinished_requests() else ():
            for sample in output.outputs:
                by_name[output.request_id].tokens[sample.index] = list(sample.token_ids)
        turn += 1


def _search(llm: Any, chance: random.Random) -> None:
    from vllm.sampling_params import BeamSearchParams

    prompts = [
        {"prompt_token_ids": [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, LONGEST))]}
        for _ in range(2)
    ]
    llm.beam_search(prompts, BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True))


def _plant(wrapper: Any, plant: str) -> None:
    """Let what reads the rows of a step in a worker, this one, spoil them."""
    reader = _reader(wrapper)
    original, reader.changes = reader.rows, 0

    def rows(scheduled: Any) -> Rows:
        found: Rows = original(scheduled)
        before = repr(found)
        PLANTS[plant](found)
        reader.changes += repr(found) != before
        return found

    reader.rows = rows


def _uproot(wrapper: Any) -> int:
    """How often the plant changed rows, which it does no longer."""
    reader = _reader(wrapper)
    del reader.rows
    return int(reader.changes)


def _reader(wrapper: Any) -> Any:
    return getattr(wrapper, "worker", wrapper).__tlcore__._bracket._reader
