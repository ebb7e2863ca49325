"""Token ids of the samples of batches outside vLLM, and how long their prompts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...layout.tokens import token_entry
from ...record import Json
from .batches import Batch, token_ids
from .named_rows import Named
from .sequences import Sequences


class SampleTokens:
    """What was read of each sample: an id for each position, each told once.

    ``prompts`` are the lengths of the prompts that are known, by sample and sequence.
    """

    def __init__(self, keeps_ids: bool) -> None:
        self._keeps_ids = keeps_ids
        self.prompts: dict[tuple[str, str], int] = {}
        # How far the ids of a sample have been told.
        self._told: dict[tuple[str, str], int] = {}
        self._in_step: list[Json] = []

    def begin_step(self) -> None:
        """Forget what the step before has told."""
        self._in_step = []

    def document(self, chooses: Callable[[str], bool] | None) -> list[Json]:
        """The entries of the step, of chosen samples."""
        return [each for each in self._in_step if chooses is None or chooses(each["request_id"])]

    def note_prompts(
        self, known: Sequences, role: str, before: Sequences | None, named: Sequence[Named | None] | None
    ) -> None:
        """Say how long the prompts of a call's samples are, where that is known.

        The first call of a sample has its prompt, unless the user says otherwise. What several positions are
        that come on top of a cache (another part of the prompt, or several tokens at once) is not known, nor
        is anything of a sample that had begun before.
        """
        if before is None:
            unclear = known.flags.shape[1] != known.length
        else:
            unclear = before.keys is not None and known.length > 1
        for place, request in enumerate(known.ids):
            if request is None:
                continue
            key = request, role
            own = None if named is None else named[place]
            if own is not None and own.prompt is not None and not role:
                self.prompts[key] = own.prompt
            elif unclear or (before is None and known.offsets[place]):
                self.prompts.pop(key, None)
            elif before is None:
                self.prompts[key] = known.length if known.is_whole else int(known.real[place].sum())

    def note_ids(self, known: Sequences, role: str, batch: Batch, begins: bool) -> None:
        """Keep the ids of the positions that a call computes, of those that are not told yet."""
        if not (self._keeps_ids and batch.has_ids):
            return
        tokens = known.tokens if known.tokens is not None else token_ids(batch)
        if tokens is None or tokens.shape != known.real.shape:
            return
        if begins:
            for request in known.ids:
                self._told.pop((str(request), role), None)
        more: dict[str, Any] = {"sequence": role} if role else {}
        length = known.length
        for entry in known.entries():
            key = entry["request_id"], role
            sample, column = divmod(entry["first_row"], length)
            first = entry["first_position"]
            new = max(0, min(self._told.get(key, 0) - first, entry["rows"]))
            self._told[key] = max(self._told.get(key, 0), first + entry["rows"])
            ids = tokens[sample, column + new : column + entry["rows"]].tolist()
            if ids:
                prompt = self.prompts.get(key)
                self._in_step.append(token_entry(entry["request_id"], first + new, ids, prompt, **more))
