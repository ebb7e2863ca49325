"""Whether a run did what its way is about: where nothing was preempted, preemption is not tested."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...reader import Run


def not_exercised(way: str, run: Run, asked: Mapping[str, Any]) -> Iterator[str]:
    """What the run should have done and did not."""
    what, did = _WAYS[way]
    if not did(run, asked):
        yield f"it shows nothing: {what}"


def _entries(run: Run) -> Iterable[Sequence[Mapping[str, Any]]]:
    return ([row for row in step.samples if "request_id" in row] for step in run.values())


def _was_alone(run: Run, asked: Mapping[str, Any]) -> bool:
    return all(len(rows) == 1 for rows in _entries(run))


def _was_batched(run: Run, asked: Mapping[str, Any]) -> bool:
    return any(len(rows) == len(asked) for rows in _entries(run))


def _was_chunked(run: Run, asked: Mapping[str, Any]) -> bool:
    return any(
        row["first_position"] + row["rows"] < asked[row["request_id"]].prompt
        for step in run.values()
        for row in step.rows or ()
        if row["request_id"] in asked
    )


def _was_cached(run: Run, asked: Mapping[str, Any]) -> bool:
    return any(int(row.get("cached", 0)) > 0 for rows in _entries(run) for row in rows)


def _was_preempted(run: Run, asked: Mapping[str, Any]) -> bool:
    requests = map(run.request, asked)
    return any(request.recomputed(name) for request in requests for name in request.names[:1])


def _was_compiled(run: Run, asked: Mapping[str, Any]) -> bool:
    return run.config.get("compiled") == "taps"


_WAYS: dict[str, tuple[str, Callable[[Run, Mapping[str, Any]], bool]]] = {
    "transformers": ("no batch had all prompts", _was_batched),
    "alone": ("some step had several requests", _was_alone),
    "batched": ("no step had all requests", _was_batched),
    "chunked prefill": ("no prompt was computed in several steps", _was_chunked),
    "prefix cache": ("no request had tokens from the cache", _was_cached),
    "preempted": ("nothing was computed again", _was_preempted),
    "compiled": ("nothing was compiled with taps", _was_compiled),
}
WAYS = tuple(_WAYS)
