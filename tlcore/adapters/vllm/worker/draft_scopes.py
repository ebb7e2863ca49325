"""Which rows the draft model of speculative decoding works on: a batch of its own, made from the target's.

Its first pass has the step's tokens again (with a slot more for each request, where the draft model is a
whole model), the further ones one row for each request: of a token that is only proposed, so that none of
these rows is kept in the request. One that fills in a block at once (DFlash) has a pass of its own kind: the
token just sampled of each request, and a mask for each draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ....layout.rows import NO_ROWS, RowSet
from ....record import Json
from .row_scopes import RowScopes
from .row_sets import Sets, rows_of
from .rows import runs_transformers


class DraftScopes:
    """Tells the scopes of a runner's draft model; ``switch`` is told when it begins and when it is over."""

    def __init__(self, scopes: RowScopes, runner: Any, switch: Callable[[bool], None]) -> None:
        self._scopes = scopes
        self._runner = runner
        self._switch = switch
        self._sampled: Any = None
        self._target: list[Json] = []
        self._lasts: list[int] = []
        self._passes = 0
        # How many tokens come between a request's last real one and the first that is proposed for it.
        self._masked = 0
        self._padded = 0
        # A draft model that works on the target's states gets with each of them the token after it.
        self._ahead = 0
        # The second model runner's; what it tells of its batches is nothing.
        scopes.wrap(getattr(runner, "speculator", None), "propose", lambda *_, **__: NO_ROWS, on=self._on)
        drafter = getattr(runner, "drafter", None)
        if getattr(drafter, "model", None) is None:
            return
        self._blocks = drafter if hasattr(drafter, "dflash_causal") else None
        self._ahead = int(bool(getattr(drafter, "pass_hidden_states_to_model", False)) and not self._blocks)
        self._batched = runs_transformers(getattr(drafter, "model", None))
        scopes.wrap(runner, "propose_draft_token_ids", self._begin, self._over, on=self._on)
        scopes.wrap(drafter, "propose", self._propose)
        scopes.wrap(drafter, "set_inputs_first_pass", after=self._first_pass)
        scopes.wrap(drafter, "_determine_batch_execution_and_padding", after=self._padding)
        scopes.wrap(drafter, "_sample_draft_tokens", self._sampling, self._next_pass)

    def _on(self, on: bool) -> None:
        self._switch(on)

    def _begin(self, scheduler_output: Any, sampled: Any, *args: Any, **kwargs: Any) -> Sets:
        self._sampled = sampled
        self._passes = self._padded = self._masked = 0
        self._target, self._lasts = [], []
        return NO_ROWS

    def _over(self, output: Any, *args: Any, **kwargs: Any) -> None:
        self._sampled = None

    def _propose(self, *args: Any, **kwargs: Any) -> Sets:
        rows = self._scopes.rows
        if rows is None:
            return NO_ROWS
        metadata = kwargs.get("common_attn_metadata")
        if metadata is None:
            return self._one_each(rows) if "target_hidden_states" in kwargs else NO_ROWS
        self._target = _with_drafts(_counted(rows, metadata.query_start_loc_cpu.tolist()), rows)
        return [RowSet("tokens", self._target)]

    def _one_each(self, rows: Sequence[Json]) -> Sets:
        """A drafter without a batch of its own gets the target's state of each request's last token."""
        if not isinstance(self._sampled, list) or len(self._sampled) != len(rows):
            return NO_ROWS
        firsts = [0]
        for row in rows:
            firsts.append(firsts[-1] + 1 + int(row.get("drafts", 0)))
        entries = []
        for place, tokens in enumerate(self._sampled):
            # Of a request that sampled nothing vLLM takes the row before, which is another request's.
            index = place if firsts[-1] == len(rows) else (firsts[place] + len(tokens) - 1) % firsts[-1]
            owner = max(i for i in range(len(rows)) if firsts[i] <= index)
            row = rows[owner]
            position = row["first_position"] + row["rows"] - (firsts[owner + 1] - index)
            entries.append(rows_of(row, place, 1, position, accepted=int(owner == place)))
        return [RowSet("requests", entries)]

    def _first_pass(self, output: Any, *args: Any, **kwargs: Any) -> None:
        tokens, indices, metadata = output
        self._scopes.enter(NO_ROWS)
        if not self._target:
            return
        starts = metadata.query_start_loc_cpu.tolist()
        rows = _counted(self._target, starts)
        if starts[len(rows)] != int(tokens):
            self._target = []
            return
        if self._blocks is not None:
            self._block_pass(rows, self._blocks.positions.tolist())
            return
        each = max(1, len(indices) // len(rows))
        lasts = indices.tolist()[::each]
        for row, last in zip(rows, lasts, strict=True):
            row["accepted"] = min(row["rows"], max(0, last - row["first_row"] + 1))
            row["ahead"] = self._ahead
        self._lasts = [
            row["first_position"] + last - row["first_row"] for row, last in zip(rows, lasts, strict=True)
        ]
        self._target = rows

    def _block_pass(self, rows: list[Json], positions: Sequence[int]) -> None:
        """Each request's block begins where its next token stands, which was sampled in this step."""
        for row in rows:
            row["first_position"] = int(positions[row["first_row"]])
            row["accepted"] = min(1, row["rows"])
        self._lasts = [row["first_position"] for row in rows]
        self._target, self._masked = rows, 1

    def _padding(self, output: Any, tokens: int, *args: Any, **kwargs: Any) -> None:
        if not self._target:
            return
        padded = max(0, int(output[1]) - int(tokens))
        if self._passes == 0:
            self._scopes.enter([RowSet("tokens", self._target, padded, batched=self._batched)])
        else:
            self._padded = padded
            self._enter_pass()

    def _enter_pass(self) -> None:
        self._scopes.enter([RowSet("drafts", self._proposed(1), self._padded, batched=self._batched)])

    def _proposed(self, each: int) -> list[Json]:
        """The rows that the next token is sampled from: of a first pass real ones, then drafts."""
        drafted = self._passes + self._masked
        return [
            rows_of(row, place * each, each, last + drafted, accepted=int(not drafted), ahead=self._ahead)
            for place, (row, last) in enumerate(zip(self._target, self._lasts, strict=True))
        ]

    def _sampling(self, hidden: Any, *args: Any, **kwargs: Any) -> Sets:
        if not self._lasts:
            return NO_ROWS
        each, rest = divmod(int(hidden.shape[0]), len(self._target))
        return NO_ROWS if rest or not each else [RowSet("sampled", self._proposed(each))]

    def _next_pass(self, output: Any, *args: Any, **kwargs: Any) -> None:
        self._passes += 1
        if self._lasts:
            self._enter_pass()


def _counted(rows: Sequence[Json], starts: Sequence[int]) -> list[Json]:
    """The rows' requests in a batch that begins where ``starts`` say."""
    return [
        rows_of(row, begin, end - begin, row["first_position"])
        for row, begin, end in zip(rows, starts, starts[1:], strict=False)
    ]


def _with_drafts(rows: Sequence[Json], target: Sequence[Json]) -> list[Json]:
    """Rows of the target's states, which still have those of its draft tokens unless they were taken out."""
    return [
        {**row, "drafts": asked["drafts"]} if row["rows"] == asked["rows"] and "drafts" in asked else row
        for row, asked in zip(rows, target, strict=False)
    ]
