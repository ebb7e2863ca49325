"""The token ids of a request: which were its prompt, which were generated, which the sampler rejected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import MissingError, ReadError
from ..record import Json

if TYPE_CHECKING:
    import torch

Part = Literal["all", "prompt", "response"]


class Rejected(NamedTuple):
    """A draft token that a step computed at ``position``, and that did not stay in the request."""

    step: int
    position: int
    token_id: int


class RequestTokens:
    """What the steps of a run tell of one request's token ids.

    ``known`` are the ids by position; of one that was read several times, the last counts. ``encoder`` are
    those that an encoder was given, of a model that has a decoder, too.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self.known: dict[int, int] = {}
        self.encoder: dict[int, int] = {}
        self.rejected: list[Rejected] = []
        self._prompts: set[int | None] = set()

    def add(self, step: int, entries: Iterable[Json]) -> None:
        """Take up a step's entries of the request (`Step.token_entries`)."""
        for entry in entries:
            first, ids, kept = entry["first_position"], entry["ids"], entry["kept"]
            own = self.encoder if entry.get("sequence") else self.known
            own.update(zip(range(first, first + kept), ids, strict=False))
            if own is self.known:
                self._prompts.add(entry.get("prompt"))
                # Drafts that nobody decided on are neither.
                if "drafts" not in entry:
                    places = range(first + kept, first + len(ids))
                    self.rejected += map(Rejected, [step] * len(places), places, ids[kept:])

    @property
    def prompt_length(self) -> int | None:
        """How many of the positions are the prompt's; None where the steps do not all say the same."""
        return next(iter(self._prompts)) if len(self._prompts) == 1 else None

    def ids(self) -> list[int]:
        """The ids of all positions from 0 on.

        Raises MissingError where none is known, ReadError where some in between are not.
        """
        if not self.known:
            raise MissingError(
                f"{self._where} has no token ids: it was captured without them (log_token_ids), with"
                ' "capture": "stats", from embeddings, or by an older tlcore'
            )
        return self.ids_at(range(max(self.known) + 1))

    def ids_at(self, positions: Sequence[int]) -> list[int]:
        """The ids at these positions. Raises ReadError where one is not known."""
        absent = [position for position in positions if position not in self.known]
        if absent:
            which = f"{len(absent)} positions are not known, the first is {absent[0]}"
            raise ReadError(f"{self._where}: the token ids of {which}")
        return [self.known[position] for position in positions]

    def tensor(self, positions: Sequence[int] | None = None) -> torch.Tensor:
        """The ids of all positions, or of some, as a tensor [positions] of int64. Raises as `ids` does."""
        import torch

        return torch.tensor(self.ids() if positions is None else self.ids_at(positions), dtype=torch.int64)

    def text(self, tokenizer: Any, part: Part) -> str:
        """What a tokenizer makes of the ids. Raises ReadError where that is not known."""
        if not callable(getattr(tokenizer, "decode", None)):
            raise ReadError(f"{type(tokenizer).__name__} is no tokenizer: it has no decode()")
        ids = self.ids()
        if part not in ("all", "prompt", "response"):
            raise ReadError(f'part={part!r} is none of "all", "prompt" and "response"')
        if part != "all":
            length = self.prompt_length
            if length is None:
                raise ReadError(f"{self._where}: where its prompt ends is not known")
            ids = ids[:length] if part == "prompt" else ids[length:]
        return str(tokenizer.decode(ids))
