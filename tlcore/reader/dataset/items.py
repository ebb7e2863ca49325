"""What a data set is made of: tokens, pieces of a context's length, or whole requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import ReadError
from ...layout.windows import Window
from .table import Pieces, Table
from .tokens import Numbers

Per = Literal["token", "request"]


@dataclass
class Items:
    """Rows in an order, and which of them each item has: ``counts`` rows from row ``starts`` on.

    Without ``starts`` each row is an item. ``ends`` are the numbers of the rows behind each piece.
    ``left_out`` says of which requests nothing is there, and why.
    """

    pieces: Pieces
    starts: Numbers | None
    counts: Numbers | None
    ends: Numbers
    left_out: dict[str, str]


def items_of(table: Table, window: Window, per: Per, context: int | None) -> Items:
    """The items of a run's table. Raises ReadError where none is left."""
    left_out: dict[str, str] = {}
    pieces = _within(table, window, left_out)
    there = set(np.unique(pieces.request).tolist())
    for number, request in enumerate(table.requests):
        if number not in there:
            left_out.setdefault(request, "it has no rows at these positions")
    if per == "token" and context is None:
        found = Items(pieces, None, None, np.cumsum(pieces.length), left_out)
    else:
        found = _sequences(table, pieces, window, context, left_out)
    if not len(found.ends if found.starts is None else found.starts):
        raise ReadError(f"{table.url}: none of its {len(table.requests)} requests has {_shown(left_out)}")
    return found


def _shown(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return "a row of these tensors at these positions"
    request, reason = next(iter(left_out.items()))
    return f"all that is asked for ({request}: {reason})"


def _within(table: Table, window: Window, left_out: dict[str, str]) -> Pieces:
    """The parts of the pieces that lie in a window of their request."""
    pieces = table.pieces
    prompts = [_prompt(table, request) for request in table.requests]
    before = np.zeros_like(pieces.length)
    length = pieces.length.copy()
    if window == Window():
        return pieces
    for number, (request, first, count) in enumerate(
        zip(pieces.request.tolist(), pieces.first.tolist(), pieces.length.tolist(), strict=True)
    ):
        part = window.part(first, count, prompts[request])
        if part is None:
            left_out[table.requests[request]] = "where its prompt ends is not known"
        before[number], length[number] = part or (0, 0)
    return pieces.cut(before, length)


def _prompt(table: Table, request: str) -> int | None:
    tokens = table.tokens.get(request)
    return None if tokens is None else tokens.prompt


def _sequences(
    table: Table, pieces: Pieces, window: Window, context: int | None, left_out: dict[str, str]
) -> Items:
    """Items that are positions of a request which follow one another."""
    # In the order in which the requests were first computed.
    _, firsts, numbers = np.unique(pieces.request, return_index=True, return_inverse=True)
    order = np.lexsort((pieces.first, firsts[numbers]))
    pieces = pieces.take(order)
    ends = np.cumsum(pieces.length)
    starts: list[int] = []
    counts: list[int] = []
    borders = np.flatnonzero(np.diff(pieces.request)) + 1
    for begin, end in zip([0, *borders.tolist()], [*borders.tolist(), len(ends)], strict=True):
        if begin == end:
            continue
        own = slice(begin, end)
        request = table.requests[int(pieces.request[begin])]
        row = int(ends[begin] - pieces.length[begin])
        runs = _runs(pieces.first[own], pieces.length[own])
        if context is None:
            problem = _problem(runs, window, _prompt(table, request))
            if problem is not None:
                left_out[request] = problem
                continue
            starts.append(row)
            counts.append(runs[0][1])
            continue
        taken = False
        for _, count in runs:
            pieces_of = count // context
            starts += range(row, row + pieces_of * context, context)
            counts += [context] * pieces_of
            row, taken = row + count, taken or bool(pieces_of)
        if not taken:
            left_out[request] = f"it has no {context} positions that follow one another"
    return Items(pieces, np.array(starts, np.int64), np.array(counts, np.int64), ends, left_out)


def _runs(first: Numbers, length: Numbers) -> list[tuple[int, int]]:
    """Positions that follow one another: where they begin, and how many."""
    found: list[tuple[int, int]] = []
    for begin, count in zip(first.tolist(), length.tolist(), strict=True):
        if found and sum(found[-1]) == begin:
            found[-1] = found[-1][0], found[-1][1] + count
        else:
            found.append((begin, count))
    return found


def _problem(runs: Sequence[tuple[int, int]], window: Window, prompt: int | None) -> str | None:
    """Why a request is not whole: what its window begins with, or something in between, is not there."""
    begin, count = runs[0]
    wanted = _first(window, prompt)
    if begin > wanted:
        return f"positions {wanted} to {begin - 1} are not there"
    if len(runs) > 1:
        return f"positions {begin + count} to {runs[1][0] - 1} are not there"
    # A prompt, or a range of positions, may also end too early.
    part = window.part(0, 1 << 62, prompt)
    end = None if window.end is None or part is None else part[0] + part[1]
    if end is not None and begin + count < end and _must_reach(window):
        return f"positions {begin + count} to {end - 1} are not there"
    return None


def _must_reach(window: Window) -> bool:
    """Whether every request has the window's last position: one that counts from the prompt's end."""
    return window.end == "prompt" or (isinstance(window.end, int) and window.end < 0)


def _first(window: Window, prompt: int | None) -> int:
    part: Any = window.part(0, 1 << 62, prompt)
    return 0 if part is None else int(part[0])
