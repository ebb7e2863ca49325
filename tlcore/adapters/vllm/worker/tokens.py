"""The token ids that a vLLM model runner's steps compute, and how long its requests' prompts are.

A prompt is told once, whole, as the scheduler has it; all other ids are read from what the model is given,
with sampled tokens and drafts. What is no token id (prompt embeddings) is told by nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ....layout.rows import Row
from ....layout.tokens import token_entry
from ....record import Json

log = logging.getLogger("vllm.tlcore")
Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Prompt(NamedTuple):
    """A request's prompt: its length, and its token ids where it consists of these alone."""

    length: int
    ids: Sequence[int] | None


# The rows of one request in a step, to be put into words later: its row, its prompt, whether that is told.
_Taken = tuple[Json, "Prompt | None", bool]


class TokenReader:
    """Reads token ids from a runner where it ``writes`` them, and the prompts' lengths in any case."""

    def __init__(self, runner: Any, writes: bool) -> None:
        self._runner = runner
        self._writes = writes
        self._new: dict[str, Prompt | None] = {}
        self._told: set[str] = set()

    def forget(self) -> None:
        """Forget the requests noted so far: another run begins."""
        self._new.clear()
        self._told.clear()

    def begin_step(self, scheduler_output: Any) -> None:
        """Note new requests' prompts, of every step, captured or not."""
        for request in getattr(scheduler_output, "finished_req_ids", ()):
            self._new.pop(request, None)
            self._told.discard(request)
        for new in getattr(scheduler_output, "scheduled_new_reqs", ()):
            # One that comes again, after a preemption or with more input, may have another prompt.
            known = _prompt(new, getattr(new, "prompt_len", None))
            if self._new.get(new.req_id, known) != known:
                self._told.discard(new.req_id)
            self._new[new.req_id] = known

    def prompt(self, request: str) -> Prompt | None:
        """A request's prompt; None where nothing is known of it."""
        known = self._new.get(request)
        if known is not None:
            return known
        state = getattr(self._runner, "requests", {}).get(request)
        if state is not None:
            return _prompt(state, getattr(state, "num_prompt_tokens", None))
        states: Any = getattr(self._runner, "req_states", None)
        index = getattr(states, "req_id_to_index", {}).get(request)
        return None if index is None else Prompt(int(states.prompt_len.np[index]), None)

    def prompts(self, requests: Sequence[str]) -> dict[tuple[str, str], int]:
        """The lengths of these requests' prompts that are known."""
        try:
            found = {request: self._new.get(request) or self.prompt(request) for request in requests}
        except (AttributeError, KeyError, TypeError, IndexError):
            log.debug("the prompts of some requests are not known", exc_info=True)
            return {}
        return {(request, ""): each.length for request, each in found.items() if each is not None}

    def given(self, rows: Sequence[Row], batch: Any) -> Numbers | None:
        """A copy of the token ids that the model is given for these rows; None where it is given none."""
        given = getattr(batch, "input_ids", None)
        if given is None:
            given = getattr(self._runner, "input_ids", None)
        if given is None:
            return None
        tensor = given if isinstance(given, torch.Tensor) else given.gpu
        total = sum(row["rows"] for row in rows)
        return tensor[:total].to("cpu", torch.int64, copy=True).numpy()

    def take(
        self, rows: Sequence[Json], batch: Any, chooses: Callable[[str], bool] | None
    ) -> Callable[[], list[Json]] | None:
        """What makes the entries of a step's ``rows``, whose ids are copied now.

        ``batch`` is that of the second model runner. None where this rank writes none, or there are none.
        """
        taken = [row for row in rows if chooses is None or chooses(row["request_id"])]
        ids = self.given(rows, batch) if self._writes and taken else None
        if ids is None:
            return None
        total = len(ids)
        embeds = bool(getattr(getattr(self._runner, "model_config", None), "enable_prompt_embeds", False))
        flags = self._runner.is_token_ids.np[:total].copy() if _has_flags(self._runner, embeds) else None
        parts = []
        for row in taken:
            request = row["request_id"]
            prompt = self._new.get(request) or self.prompt(request)
            tells = prompt is not None and prompt.ids is not None and request not in self._told
            parts.append((row, prompt, tells))
            if tells:
                self._told.add(request)
        return lambda: list(_entries_of(parts, ids, flags, embeds))


def _has_flags(runner: Any, embeds: bool) -> bool:
    return embeds and getattr(runner, "is_token_ids", None) is not None


def _prompt(known: Any, length: int | None) -> Prompt | None:
    ids = getattr(known, "prompt_token_ids", None)
    embeds = getattr(known, "prompt_embeds", None)
    if length is None:
        length = len(ids) if ids is not None else None if embeds is None else len(embeds)
    if length is None:
        return None
    return Prompt(int(length), ids if embeds is None and ids is not None and len(ids) == length else None)


def _entries_of(parts: Sequence[_Taken], ids: Numbers, flags: Any, embeds: bool) -> Iterator[Json]:
    numbers = ids.tolist()
    alone = flags is None and not embeds
    for part in parts:
        entry = _sampled(part, numbers) if alone else None
        if entry is None:
            yield from _told(part, ids, flags, embeds)
        else:
            yield entry


def _sampled(part: _Taken, ids: Sequence[int]) -> Json | None:
    """What `_entries` says of a request that goes on behind its prompt without drafts; None of any other."""
    row, prompt, tells = part
    first = row["first_row"]
    own = ids[first : first + row["rows"]]
    if tells or "drafts" in row or not own or min(own) < 0:
        return None
    if prompt is None or prompt.ids is None or row["first_position"] >= prompt.length:
        length = None if prompt is None else prompt.length
        return token_entry(row["request_id"], row["first_position"], own, length)
    return None


def _told(part: _Taken, ids: Numbers, flags: Any, embeds: bool) -> list[Json]:
    try:
        return list(_entries(part, ids, flags, embeds))
    except ValueError as error:
        log.warning("token ids are left out: %s", error)
        return []


def _entries(part: _Taken, ids: Numbers, flags: Any, embeds: bool) -> Iterator[Json]:
    """The entries of one request. Raises ValueError where the model was given another prompt."""
    row, prompt, tells = part
    request, first, count = row["request_id"], row["first_position"], row["rows"]
    own = ids[row["first_row"] : row["first_row"] + count]
    known = np.ones(count, bool) if flags is None else flags[row["first_row"] : row["first_row"] + count]
    length = None if prompt is None else prompt.length
    inside = 0 if length is None else max(0, min(count, length - first))
    if prompt is not None and prompt.ids is not None:
        if own[:inside].tolist() != list(prompt.ids[first : first + inside]):
            raise ValueError(f"the model was not given the prompt of {request} as the scheduler has it")
        if tells:
            yield token_entry(request, 0, prompt.ids, length)
        known = known & (np.arange(count) >= inside)
    elif embeds and flags is None:
        # Which of a prompt's positions are embeddings is not told.
        known = known & (np.arange(count) >= (count if length is None else inside))
    for run in _runs(known & (own >= 0)):
        yield token_entry(request, first + run.start, own[run].tolist(), length, **_drafts(row, run))


def _runs(known: Any) -> Iterator[slice]:
    places = np.flatnonzero(known)
    for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
        if len(run):
            yield slice(int(run[0]), int(run[-1]) + 1)


def _drafts(row: Mapping[str, Any], run: slice) -> dict[str, int]:
    """Which of a run of a row's tokens are drafts."""
    if "drafts" not in row:
        return {}
    first = row["rows"] - row["drafts"]
    drafts = max(0, run.stop - max(run.start, first))
    before = min(row["drafts"], max(0, run.start - first))
    return {"drafts": drafts} | ({"drafts_before": before} if before else {})


def scheduled_firsts(scheduler_output: Any) -> dict[str, int]:
    """The first position that each request of a step computes, as the scheduler counts them."""
    new = getattr(scheduler_output, "scheduled_new_reqs", ())
    cached = getattr(scheduler_output, "scheduled_cached_reqs", None)
    going_on = zip(getattr(cached, "req_ids", ()), getattr(cached, "num_computed_tokens", ()), strict=False)
    found = {each.req_id: int(each.num_computed_tokens) for each in new}
    return found | {request: int(computed) for request, computed in going_on}
