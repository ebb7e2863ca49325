"""The sequences of a batch from call to call: which positions are real, and which calls go on with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ...layout.rows import RowSet
from ...record import Json
from .batches import Batch, Flags, Numbers, cached_keys, token_ids


class Whole(NamedTuple):
    """What is known of a whole model.

    ``two_part`` is one of encoder and decoder, one with ``channels`` may have positions last. ``weights``
    are the extents of its weights, ``ends`` token ids after which a sample is over, ``padding`` what follows,
    ``starts`` what a decoder is given before its first token. One that ``packs`` may have the positions in
    front of the samples, also in one axis; ``swaps`` tells whether it may in two.
    """

    two_part: bool
    channels: bool
    weights: frozenset[int]
    ends: frozenset[int]
    padding: frozenset[int]
    starts: frozenset[int] = frozenset()
    packs: bool = False
    swaps: Callable[[], bool] = bool


class Taker(NamedTuple):
    """A module that takes a batch: its name, its ``forward``'s parameters, and the model it is part of."""

    name: str
    parameters: tuple[str, ...]
    model: Whole

    @property
    def root(self) -> bool:
        """Whether it is the model itself."""
        return not self.name


@dataclass(eq=False)
class Sequences:
    """Samples of one batch, as far as they have been computed: which of their positions are real."""

    ids: list[str | None]
    flags: Flags
    offsets: Numbers
    length: int
    tokens: Numbers | None
    prompt: int
    mask: Any = None
    keys: weakref.ref[torch.Tensor] | None = None
    ended: list[bool] = field(default_factory=list)
    left_out: Flags | None = None
    row_set: RowSet | None = None

    @property
    def real(self) -> Flags:
        """Which of the positions of the last call are a sample's, [samples, length]."""
        real = self.flags[:, self.flags.shape[1] - self.length :]
        return real if self.left_out is None else real & ~self.left_out

    @property
    def positions(self) -> Numbers:
        """Where these lie in their samples."""
        counted: Numbers = np.cumsum(self.flags, 1)[:, self.flags.shape[1] - self.length :] - 1
        return counted + self.offsets[:, None]

    @cached_property
    def _has_no_padding(self) -> bool:
        return bool(self.flags.all())

    @property
    def is_whole(self) -> bool:
        """Whether all positions up to now are real, as of most batches."""
        return self.left_out is None and self._has_no_padding

    def entries(self, more: Mapping[str, str] | None = None) -> list[Json]:
        """An entry for each run of a sample's positions that follow one another."""
        if not self.is_whole or not self.length:
            return entries_of(self.ids, self.real, self.positions, more)
        found: list[Json] = []
        past, length = self.flags.shape[1] - self.length, self.length
        for sample, (request, offset) in enumerate(zip(self.ids, self.offsets.tolist(), strict=True)):
            if request is not None:
                entry: Json = {"request_id": request, "first_row": sample * length, "rows": length}
                found.append({**entry, "first_position": past + offset, **(more or {})})
        return found


def is_same(known: Sequences, batch: Batch) -> bool:
    """Whether a call inside another has the very batch of that one."""
    if (len(known.ids), known.length) != (batch.samples, batch.length):
        return False
    if batch.mask is known.mask or not batch.has_mask:
        return True
    shape = tuple(batch.mask.shape)
    return shape == known.flags.shape and np.array_equal(batch.mask_values != 0, known.flags)


def longer(flags: Flags, length: int) -> Flags | None:
    """Positions up to now, where all that came since is real."""
    more = length - flags.shape[1]
    return np.pad(flags, ((0, 0), (0, more)), constant_values=True) if more > 0 else None


def goes_on(before: Sequences, batch: Batch, past: int | None, flags: Flags) -> bool:
    """Whether a batch continues the samples of an earlier call: their cache, or the same tokens and more."""
    if len(before.ids) != batch.samples:
        return False
    if past:
        keys = cached_keys(batch.cache)
        untouched = keys is not None and before.keys is not None and before.keys() is keys
        return untouched and before.flags.shape[1] == past and bool((flags[:, :past] == before.flags).all())
    if past is None or before.keys is not None or before.tokens is None or not batch.has_ids:
        return False
    length = before.tokens.shape[1]
    if length >= batch.length or not (flags[:, :length] == before.flags).all():
        return False
    tokens = token_ids(batch)
    return tokens is not None and bool((tokens[:, :length] == before.tokens).all())


def leave_out_ended(known: Sequences, before: Sequences, taker: Taker) -> None:
    """Rows of a sample whose end was fed to the model, as others in the batch went on, are nobody's.

    One sample alone would not have gone on, so whoever feeds it means to.
    """
    if known.tokens is None or len(known.ids) < 2 or (before.keys is not None and known.length > 1):
        return
    generated = 0 if before.keys is not None else known.prompt
    left_out = np.zeros_like(known.real)
    for sample, tokens in enumerate(known.tokens):
        ended = known.ended[sample] if before.keys is not None else False
        for place in range(generated, known.length):
            token = int(tokens[place])
            ended = token in taker.model.ends or token in taker.model.padding
            left_out[sample, place] = ended
        known.ended[sample] = ended
    known.left_out = left_out


def entries_of(
    ids: Sequence[str | None], real: Flags, positions: Numbers, more: Mapping[str, str] | None = None
) -> list[Json]:
    """An entry for each run of a sample's positions that follow one another."""
    found: list[Json] = []
    samples, length = real.shape
    edges = np.zeros((samples, length + 2), np.int8)
    edges[:, 1:-1] = real
    steps = np.diff(edges)
    owners, firsts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    runs = zip(*(each.tolist() for each in (owners, firsts, ends, positions[owners, firsts])), strict=True)
    for sample, first, end, position in runs:
        request = ids[sample]
        if request is not None:
            entry: Json = {"request_id": request, "first_row": sample * length + first, "rows": end - first}
            found.append({**entry, "first_position": position, **(more or {})})
    return found


def token_numbers(*configs: Any, key: str) -> Collection[int]:
    """The token ids that the first configuration with ``key`` gives, one or several."""
    for config in configs:
        found = getattr(config, key, None)
        if type(found) is int:
            return (found,)
        if isinstance(found, (list, tuple)) and all(type(each) is int for each in found):
            return tuple(found)
    return ()
