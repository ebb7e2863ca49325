"""Pairs of tensors, or of their rows, that belong together, and what has no partner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...layout.names import PathKey
from ...record import Json
from ..results import TensorResult
from ..rulebook import tensor_name

Key = tuple[int, str, int, str, tuple[PathKey, ...]]
# From which column on, up to which, and how many there are.
Columns = tuple[int, int, int]


def key_name(key: Key) -> str:
    """The name that rules are searched in."""
    return tensor_name(key[1], key[3], key[4])


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor that belong to one request, or a whole tensor (``request`` is None).

    ``axis`` is the tensor's axis of positions, whose rows are counted as in `layout.rows.as_rows`.
    """

    request: str | None
    rows: tuple[int, int] | None
    first_position: int | None
    axis: int = 0


WHOLE = Piece(None, None, None)


class Shards(NamedTuple):
    """The names under which each rank has as much of a tensor, and the widths of what it has side by side."""

    names: tuple[str, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """Where one side of a pair lies: a step and one tensor in it, or two tensors to be added.

    With ``unshard`` each name stands for the tensor that the ranks' parts make up. ``by`` are the name and
    record of the experts that were chosen for each token, in whose order its values are compared, ``logits``
    the name of what they were chosen by. Of a tensor with ``columns`` only these count, and ``whole`` is the
    record of all of it. A name in ``shards`` stands for what ranks have of a tensor, joined.
    """

    step: int
    names: tuple[str, ...]
    records: tuple[Json, ...]
    unshard: bool = False
    by: tuple[str, Json] | None = None
    logits: str | None = None
    columns: Columns | None = None
    whole: Json | None = None
    shards: Mapping[str, Shards] = field(default_factory=dict)

    @property
    def laid_out(self) -> Json:
        """The record by whose shape it is known whose the rows are."""
        return self.records[0] if self.whole is None else self.whole

    @property
    def needed(self) -> tuple[Json, ...]:
        """The records of all that the values come from."""
        return self.records if self.by is None else (*self.records, self.by[1])

    @property
    def is_experts(self) -> bool:
        """Whether it says which experts were chosen."""
        return self.by is not None and self.names == self.by[:1]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors to be compared, whole or piece by piece (of A, of B).

    ``reordered``: dimensions of one may stand elsewhere, as Megatron has [tokens, 1, ...].
    """

    key: Key
    a: Located
    b: Located
    pieces: tuple[tuple[Piece, Piece], ...] = ((WHOLE, WHOLE),)
    reordered: bool = False


@dataclass(frozen=True, slots=True)
class Matching:
    """All pairs in order of execution in run A, and what cannot be paired.

    ``left_out`` are tensors that exist and are no result: neither run stored them, or only one has them
    and that is to be ignored.
    """

    pairs: Sequence[Pair]
    missing: Sequence[TensorResult]
    notes: Sequence[str]
    left_out: Sequence[TensorResult] = ()


def absent(
    key: Key, source: Located, side: int, request: str | None = None, what: str = "it"
) -> TensorResult:
    """The result for a tensor, or ``what`` of it, that only one side (0: A, 1: B) has."""
    rank, module, call, _, path = key
    name = source.names[0]
    record = source.records[0]
    return TensorResult(
        status="missing",
        step=source.step,
        rank=rank,
        module=module,
        call=call,
        direction=record["direction"],
        path=path,
        names=(None, name) if side else (name, None),
        reason=f"only {'AB'[side]} has {what}",
        request=request,
    )
