"""Which requests' rows of a step are stored, as ``rows``, ``request_ids`` and ``sample_rate`` say."""

from __future__ import annotations

import functools
import re
from typing import Any

import xxhash

from ....config.configuration import Config
from ....engine.hooks.row_filter import Cut
from ....record import Json
from .rows import RowReader

_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}\Z")
_WHOLE = 1 << 64


class RequestSampler:
    """Chooses requests by their ids, and of their rows all or the last, before anything is copied."""

    def __init__(self, config: Config, reader: RowReader) -> None:
        self._last_only = config.rows == "last"
        self._patterns = (
            None if config.request_ids is None else [re.compile(text) for text in config.request_ids]
        )
        self._rate = config.sample_rate
        self._seed = config.sample_seed
        self._reader = reader
        # A request is asked about in each of its steps.
        self.chooses = functools.lru_cache(maxsize=1 << 16)(self._chooses)
        self.rows: list[Json] | None = None

    def _chooses(self, request_id: str) -> bool:
        """Whether a request is captured: the same answer in every step, rank and run."""
        if self._patterns is not None and not any(pattern.search(request_id) for pattern in self._patterns):
            return False
        if self._rate >= 1:
            return True
        # The suffix is random, and the same request must be chosen again in another run.
        plain = _RANDOM_SUFFIX.sub("", request_id)
        return xxhash.xxh3_64_intdigest(f"{self._seed}:{plain}".encode()) < self._rate * _WHOLE

    def wants(self, scheduler_output: Any) -> bool:
        """Whether a step has a chosen request at all."""
        self.rows = None
        return any(map(self.chooses, scheduler_output.num_scheduled_tokens))

    def cut(self, scheduler_output: Any) -> Cut:
        """What is kept of the step's tensors; ``rows`` then describes what they are afterwards.

        Raises RowError where the batch is not known for certain.
        """
        listed, padded = self._reader.rows(scheduler_output)
        chosen = [place for place, row in enumerate(listed) if self.chooses(row["request_id"])]
        kept = [self._kept(listed[place]) for place in chosen]
        rows: list[Json] = []
        first = 0
        for place, (begin, count) in zip(chosen, kept, strict=True):
            row = listed[place]
            position = row["first_position"] + begin - row["first_row"]
            rows.append({**row, "first_row": first, "rows": count, "first_position": position})
            first += count
        self.rows = rows
        tokens = sum(row["rows"] for row in listed)
        return Cut(kept, tokens, padded or _padding(tokens), chosen, len(listed))

    def _kept(self, row: Json) -> tuple[int, int]:
        if self._last_only:
            return row["first_row"] + row["rows"] - 1, 1
        return row["first_row"], row["rows"]


def _padding(tokens: int) -> int:
    """How many rows of padding the running forward pass has, as far as vLLM says."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return 0
    described = getattr(get_forward_context(), "batch_descriptor", None)
    return max(0, int(getattr(described, "num_tokens", tokens)) - tokens)
