"""How many of a step's draft tokens stayed in their requests, which only the sampler's result tells."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ....layout.drafts import Decided
from ....layout.rows import Row

log = logging.getLogger("vllm.tlcore")
Tokens = Mapping[str, Sequence[int]]
# A request's sampling parameters, and the length of its prompt.
Asked = Callable[[str], "tuple[Any, int] | None"]


def drafts_decided(
    asked: Asked, longest: int, rows: Sequence[Row], output: Any
) -> Callable[[], dict[str, Decided]] | None:
    """What tells, from the step's ``output``, what became of the draft tokens of each request of ``rows``.

    With asynchronous scheduling it waits for the tokens to arrive from the device, so it is to be called
    in another thread. ``asked`` is `RowReader.asked`, ``longest`` the longest length of any request. None
    where no request has draft tokens, or the output does not tell (that of a pipeline's first stages).
    """
    drafted = [row for row in rows if row.get("drafts")]
    tokens = _sampled(output) if drafted else None
    if tokens is None:
        return None
    ends = {row["request_id"]: _end_of(asked(row["request_id"]), longest, row) for row in drafted}

    def tell() -> dict[str, Decided]:
        sampled = tokens()
        found = {}
        for row in drafted:
            request = row["request_id"]
            if request in sampled:
                new = sampled[request]
                stayed = ends[request](new)
                # The last one sampled is no draft.
                kept = min(row["drafts"], max(0, len(new) - 1), stayed)
                found[request] = Decided(kept, stayed, _length(row) + stayed)
        return found

    return tell


def _sampled(output: Any) -> Callable[[], Tokens] | None:
    """The tokens that a step's output has for each request, once they have arrived."""
    if hasattr(output, "sampled_token_ids_cpu"):
        return lambda: _of_first_version(output)
    if hasattr(output, "num_sampled_tokens_np"):
        return lambda: _of_second_version(output)
    requests, tokens = getattr(output, "req_ids", None), getattr(output, "sampled_token_ids", None)
    if not requests or not tokens:
        return None
    # The scheduler shortens these lists.
    copied = {request: list(new) for request, new in zip(requests, tokens, strict=False)}
    return lambda: copied


def _of_first_version(output: Any) -> Tokens:
    output.async_copy_ready_event.synchronize()
    invalid = set(output._invalid_req_indices)
    size = int(output.vocab_size)
    return {
        request: [] if place in invalid else [token for token in new if 0 <= token < size]
        for place, (request, new) in enumerate(
            zip(output._model_runner_output.req_ids, output.sampled_token_ids_cpu.tolist(), strict=False)
        )
    }


def _of_second_version(output: Any) -> Tokens:
    output.copy_event.synchronize()
    requests = output.model_runner_output.req_ids
    counts = output.num_sampled_tokens_np.tolist()
    tokens = output.sampled_token_ids.tolist()
    return {request: new[:count] for request, new, count in zip(requests, tokens, counts, strict=False)}


class _Asked:
    """A request as vLLM's own rule for its end looks at it."""

    pooling_params = None
    status: Any = None
    stop_reason: Any = None

    def __init__(self, params: Any, prompt: int, before: int) -> None:
        self.sampling_params = params
        self.max_tokens = params.max_tokens
        self.eos_token_id = getattr(params, "eos_token_id", None)
        self.output_token_ids = [-1] * max(0, before - prompt)
        self._prompt = prompt

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self._prompt + len(self.output_token_ids)


def _length(row: Row) -> int:
    """The length of a row's request before the step's tokens are sampled."""
    return int(row["first_position"] + row["rows"] - row["drafts"])


def _end_of(asked: tuple[Any, int] | None, longest: int, row: Row) -> Callable[[Sequence[int]], int]:
    """How many of the tokens sampled at once a request keeps: those after its end are cut off."""
    params, prompt = asked or (None, 0)
    if params is None:
        return len
    before = _length(row)

    def kept(tokens: Sequence[int]) -> int:
        try:
            from vllm.v1.core.sched.utils import check_stop

            request: Any = _Asked(params, prompt, before)
            for count, token in enumerate(tokens, 1):
                request.output_token_ids.append(token)
                if check_stop(request, longest):
                    return count
        except Exception:
            log.debug("the end of a request is not known", exc_info=True)
        return len(tokens)

    return kept
