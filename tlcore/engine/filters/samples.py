"""Which rows of a call's tensors are which sample's, outside vLLM: as masks tell, or the user says.

A sample is one sequence of a batch. It keeps its id in the calls that go on with it, as generation does: with
a cache that nobody has touched since, or with its own tokens and more of them. All others begin new samples.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from ...layout.grids import Grid
from ...layout.hashes import HASH_PREFIX
from ...layout.rows import LOGITS, NO_ROWS, RowSet
from ...record import Json
from .batches import (
    Batch,
    Flags,
    UnknownRowsError,
    batch_of,
    cache_in,
    cached_keys,
    cached_positions,
    check_positions,
    mask_flags,
    token_ids,
    unmasked_flags,
)
from .named_rows import Named, other_batch, with_ranges
from .sample_tokens import SampleTokens
from .sequences import Sequences, Taker, entries_of, goes_on, is_same, leave_out_ended, longer

ENCODER = "encoder"
_NO_PROMPT = (
    "where the prompt ends is not known: several positions came on top of a cache; say it with"
    ' `capture.step(rows=[{"request_id": ..., "prompt": 12}])`'
)


@dataclass(eq=False)
class Scope:
    """A call that takes a batch: the row sets of what it calls, and the samples by their role."""

    sets: tuple[RowSet, ...] = NO_ROWS
    known: dict[str, Sequences] = field(default_factory=dict)
    cache: Any = None


class Samples:
    """The samples of a run: new ones get numbers as ids, unless the user gives them ``named`` ones."""

    def __init__(self, keeps_ids: bool = False, needs_prompts: bool = False) -> None:
        """``keeps_ids``: also read token ids. ``needs_prompts``: rows are known only where prompts are."""
        self.tokens = SampleTokens(keeps_ids)
        self._needs_prompts = needs_prompts
        self.named: list[Named | None] | None = None
        # Why rows were not known, and in how many calls.
        self.problems: Counter[str] = Counter()
        self.any_known = False
        # Whether a batch was looked at in this step.
        self.asked = False
        self._next = 0
        self._last: dict[tuple[str, str], Sequences] = {}
        self._hashes: dict[str, str] = {}
        self._encoded: tuple[weakref.ref[torch.Tensor], Sequences] | None = None
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what was said of the step before."""
        self.asked = False
        self.tokens.begin_step()
        self._in_step: dict[str, Json] = {}
        self._problem: str | None = None

    def document(self, chooses: Any = None) -> Json:
        """The keys of ``step.json`` that say which samples the step has, and why not of all calls."""
        found: Json = {}
        samples = [each for each in self._in_step.values() if chooses is None or chooses(each["request_id"])]
        if samples:
            found["samples"] = samples
        if self._problem is not None:
            found["rows_unavailable"] = self._problem
        return found

    def scope(self, taker: Taker, given: Mapping[str, Any], outer: Scope | None) -> Scope:
        """The rows of a call with these arguments, inside another one or not."""
        self.asked = True
        scope = Scope(cache=given.get("past_key_values"))
        try:
            sets = self._sets(taker, given, outer, scope)
        except UnknownRowsError as error:
            self._note(str(error))
            return Scope()
        if self._lacks_prompts(scope.known):
            self._note(_NO_PROMPT)
            return scope
        scope.sets = tuple(sets)
        self.any_known |= bool(sets)
        return scope

    def _note(self, problem: str) -> None:
        self._problem = self._problem or problem
        self.problems[problem] += 1

    def returned(self, scope: Scope, result: Any) -> None:
        """What a call of ``scope`` has returned: its cache is how the samples are known again."""
        keys = cached_keys(cache_in(result, scope.cache))
        known = scope.known.get("")
        if known is not None:
            known.keys = None if keys is None else weakref.ref(keys)
        encoded = scope.known.get(ENCODER)
        states = _states_in(result)
        if encoded is not None and known is None and states is not None:
            self._encoded = weakref.ref(states), encoded

    # What the arguments say

    def _sets(
        self, taker: Taker, given: Mapping[str, Any], outer: Scope | None, scope: Scope
    ) -> list[RowSet]:
        if "decoder_input_ids" in taker.parameters:
            return self._of_two_parts(taker, given, outer, scope)
        states = given.get("encoder_hidden_states")
        role = ENCODER if taker.model.two_part and states is None and not taker.root else ""
        batch = batch_of(given, any_tensor=taker.root)
        if batch is None:
            return self._wholes(taker, given) if taker.root else self._nothing(outer)
        known = self._assign(taker, role, batch, outer, begun=states is not None)
        scope.known[role] = known
        sets = [self._set(taker, known, role)]
        if states is not None:
            sets += self._of_encoder(taker, known, states, given.get("encoder_attention_mask"))
        if taker.root and _has_other_inputs(given):
            # Images and sounds have rows of their own, which may be as many.
            return []
        return sets + self._of_logits(taker, known, given)

    def _nothing(self, outer: Scope | None) -> list[RowSet]:
        return [] if outer is None else list(outer.sets)

    def _wholes(self, taker: Taker, given: Mapping[str, Any]) -> list[RowSet]:
        """Samples of a model that takes no sequences: each is one row, whatever that holds."""
        if self.named is None:
            if "attention_mask" in taker.parameters and given.get("attention_mask") is not None:
                raise UnknownRowsError("no tokens were found beside the attention_mask")
            return []
        if any(each is not None and each.rows is not None for each in self.named):
            raise UnknownRowsError("rows gives ranges of positions, and no tensor has an axis of them")
        first = next((each for each in given.values() if isinstance(each, torch.Tensor) and each.dim()), None)
        if first is None or first.shape[0] != len(self.named):
            raise UnknownRowsError(other_batch(self.named, None if first is None else int(first.shape[0])))
        rows = []
        for place, each in enumerate(self.named):
            request = f"padding {place}" if each is None else each.request_id
            rows.append({"request_id": request, "first_row": place, "rows": 1})
            if each is not None:
                rows[-1]["first_position"] = each.first_position
                self._in_step.setdefault(request, {"request_id": request})
        return [RowSet("samples", rows)]

    def _of_two_parts(
        self, taker: Taker, given: Mapping[str, Any], outer: Scope | None, scope: Scope
    ) -> list[RowSet]:
        sets: list[RowSet] = []
        source = batch_of(given)
        encoded: Sequences | None = None
        if source is not None and given.get("encoder_outputs") is None:
            encoded = scope.known[ENCODER] = self._assign(taker, ENCODER, source, outer)
            sets.append(self._set(taker, encoded, ENCODER))
        else:
            encoded = self._known_again(given.get("encoder_outputs"))
        target = batch_of(given, "decoder_")
        if target is None:
            return sets
        known = self._assign(taker, "", target, outer, begun=True, ids_of=encoded)
        scope.known[""] = known
        return [*sets, self._set(taker, known, "")]

    def _known_again(self, outputs: Any) -> Sequences | None:
        """The samples whose encoder's output this is."""
        states = _states_in(outputs)
        if self._encoded is None or states is None or self._encoded[0]() is not states:
            return None
        return self._encoded[1]

    def _of_encoder(self, taker: Taker, known: Sequences, states: Any, mask: Any) -> list[RowSet]:
        """What a decoder sees of its encoder, row for row of the batch."""
        if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[0] != len(known.ids):
            return []
        batch = Batch(states, mask, None, None)
        flags = mask_flags(batch, None) if mask is not None else None
        if flags is None:
            if batch.samples > 1:
                return []
            flags = np.ones((1, batch.length), bool)
        seen = Sequences(known.ids, flags, np.zeros(batch.samples, np.int64), batch.length, None, 0)
        self.tokens.note_prompts(seen, ENCODER, None, None)
        return [self._set(taker, seen, ENCODER)]

    def _of_logits(self, taker: Taker, known: Sequences, given: Mapping[str, Any]) -> list[RowSet]:
        """The rows of logits where the model computes those of the last positions only."""
        keep = given.get("logits_to_keep", given.get("num_logits_to_keep"))
        if (
            type(keep) is not int
            or not 0 < keep < known.length
            or "logits_to_keep" not in str(taker.parameters)
        ):
            return []
        last = slice(known.length - keep, None)
        grid = Grid(len(known.ids), keep, known.flags.shape[1])
        return [
            RowSet(LOGITS, entries_of(known.ids, known.real[:, last], known.positions[:, last]), grid=grid)
        ]

    def _set(self, taker: Taker, known: Sequences, role: str) -> RowSet:
        if known.row_set is not None:
            return known.row_set
        more = {"sequence": role} if role else {}
        samples, length = len(known.ids), known.length
        model = taker.model
        weights = {length, samples * length} & model.weights
        if model.packs and samples > 1 and length > 1:
            weights.add(samples * length)
        if samples == length > 1 and (model.packs or model.swaps()):
            weights.add(length)
        grid = Grid(samples, length, known.flags.shape[1], model.channels, tuple(sorted(weights)))
        for request, ended in zip(known.ids, known.ended or [False] * samples, strict=True):
            if request is not None:
                entry = self._in_step.setdefault(request, {"request_id": request})
                if request in self._hashes:
                    entry["prompt_hash"] = self._hashes[request]
                if ended:
                    entry["ended"] = True
        known.row_set = RowSet("tokens", known.entries(more), grid=grid)
        return known.row_set

    # Who they are

    def _assign(
        self,
        taker: Taker,
        role: str,
        batch: Batch,
        outer: Scope | None,
        begun: bool = False,
        ids_of: Sequences | None = None,
    ) -> Sequences:
        inherited = None if outer is None else outer.known.get(role)
        if inherited is not None and is_same(inherited, batch):
            return inherited
        past = cached_positions(batch.cache)
        before = self._last.get((taker.name, role))
        flags = self._flags(taker, batch, past, begun, before)
        continued = before is not None and goes_on(before, batch, past, flags)
        known = self._new(batch, flags, before if continued else None, ids_of)
        check_positions(batch, known.real)
        self.tokens.note_prompts(known, role, before if continued else None, self.named)
        if continued and before is not None:
            leave_out_ended(known, before, taker)
        elif role == ENCODER or (ids_of is None and not begun):
            self._hash(known)
        self.tokens.note_ids(known, role, batch, begins=not continued)
        self._last[taker.name, role] = known
        return known

    def _lacks_prompts(self, known: Mapping[str, Sequences]) -> bool:
        """Whether the prompts' lengths are asked for, and not known of all samples."""
        owners = [(each, role) for role, those in known.items() for each in those.ids if each is not None]
        return self._needs_prompts and not all(each in self.tokens.prompts for each in owners)

    def _flags(
        self, taker: Taker, batch: Batch, past: int | None, begun: bool, before: Sequences | None
    ) -> Flags:
        if batch.mask is not None:
            flags = mask_flags(batch, past)
        else:
            more = None if before is None or past is None else longer(before.flags, past + batch.length)
            if more is not None and before is not None and goes_on(before, batch, past, more):
                flags = more
            elif self.named is not None and past is not None:
                flags = np.ones((batch.samples, past + batch.length), bool)
            else:
                padding = taker.model.padding or taker.model.ends
                flags = unmasked_flags(batch, past, begun, padding, taker.model.starts)
        if self.named is not None:
            if len(self.named) != batch.samples:
                raise UnknownRowsError(other_batch(self.named, batch.samples))
            flags = with_ranges(flags, self.named, batch.length)
        return flags

    def _new(
        self, batch: Batch, flags: Flags, before: Sequences | None, ids_of: Sequences | None
    ) -> Sequences:
        offsets = np.zeros(batch.samples, np.int64) if before is None else before.offsets
        ids: list[str | None]
        if self.named is not None:
            ids = [None if each is None else each.request_id for each in self.named]
            if before is None:
                offsets = np.array([0 if each is None else each.first_position for each in self.named])
        elif before is not None:
            ids = before.ids
        elif ids_of is not None and len(ids_of.ids) == batch.samples:
            ids = ids_of.ids
        else:
            ids = [str(self._next + place) for place in range(batch.samples)]
            self._next += batch.samples
        tokens = token_ids(batch) if before is None or cached_positions(batch.cache) == 0 else None
        prompt = batch.length if before is None else before.prompt
        known = Sequences(list(ids), flags, offsets, batch.length, tokens, prompt, batch.mask)
        if before is not None and before.keys is not None and batch.length == 1:
            known.tokens = token_ids(batch)
        known.ended = [False] * batch.samples if before is None else list(before.ended)
        return known

    def _hash(self, known: Sequences) -> None:
        """Note the prompts by which other runs know these samples, where they begin here."""
        if known.tokens is None or known.flags.shape[1] != known.length or known.offsets.any():
            return
        for request, tokens, real in zip(known.ids, known.tokens, known.real, strict=True):
            if request is not None and real.any():
                digest = xxhash.xxh3_128_hexdigest(tokens[real].tobytes())
                self._hashes[request] = f"{HASH_PREFIX}{digest}"


def _states_in(result: Any) -> torch.Tensor | None:
    """The states in an encoder's result."""
    found = getattr(result, "last_hidden_state", None)
    if found is None and isinstance(result, (tuple, list)) and result:
        found = result[0]
    return found if isinstance(found, torch.Tensor) else None


def _has_other_inputs(given: Mapping[str, Any]) -> bool:
    """Whether a call with tokens has images or sounds as well, in a tensor of three axes or more."""
    if not {"input_ids", "inputs_embeds"} & given.keys():
        return False
    return any(
        isinstance(value, torch.Tensor) and value.dim() > 2 and "mask" not in name
        for name, value in given.items()
        if name != "inputs_embeds"
        and not name.startswith(("encoder_", "decoder_", "past", "position", "label"))
    )
