"""Whose row is whose in a step's tensors: one rule for capture, for the reader and for comparisons.

Whoever runs a step says which rows the tensors of a call have: one *row set*, or several that differ in
length (images, and the tokens that stand for them). Only the number of rows of a tensor then chooses
among the sets of its own call. What no set of the call describes belongs to nobody.

Outside vLLM a batch is a *grid* of samples and positions, padded where samples are shorter, and which axis of
a tensor is which is told by its shape, where that leaves no doubt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from .checks import is_whole
from .grids import UNCLEAR, Grid, axis_of, read_grid
from .one_sample import axis_in_sample
from .row_scale import presented
from .unordered import is_sorted

Row = Mapping[str, Any]


class Span(NamedTuple):
    """``length`` rows of a tensor from row ``begin`` on, which belong to ``row``'s request.

    They are its positions from ``first`` on; None where rows have an owner but no position in it. Where
    ``axis`` is 1 or 2, that is the axis of positions of a tensor whose axis 0 is that of samples: its rows
    are counted as in `as_rows`.
    """

    row: Row
    begin: int
    length: int
    first: int | None
    axis: int = 0

    def kept(self) -> Span:
        """The leading rows whose tokens stayed in the request: draft tokens may have been rejected.

        Where only the last row is wanted, it is that which the last of these tokens was sampled from.
        """
        accepted, last = self.row.get("accepted"), self.row.get("last")
        if accepted is None:
            accepted = self.length - int(self.row.get("drafts", 0))
        kept = max(0, min(self.length, accepted))
        if last is None or last >= kept:
            return self._replace(length=kept)
        return self._replace(
            begin=self.begin + last, length=1, first=None if self.first is None else self.first + last
        )


def adapter_of(row: Row) -> str | None:
    """The name of the adapter (LoRA) that the model had on for a row's request; None where none is told."""
    found = row.get("adapter")
    return found if isinstance(found, str) else None


# The kind of rows that only logits have: those of the last positions, where others are not computed.
LOGITS = "logits"


@dataclass(frozen=True)
class RowSet:
    """The rows that tensors of one length have, and ``padded`` meaningless ones that may follow them.

    ``rows`` are entries as in ``step.json``, one after the other: ``request_id``, ``first_row``, ``rows``
    (how many), ``first_position``, and more that is known of the request. ``kind`` says what a row is.
    With a ``grid`` its rows are counted, those of its first sample first; what no entry names is padding.
    With ``vectors`` a tensor of one axis may be one request's, such as the scores of its labels, so that
    only whole numbers have these rows. ``single`` are shapes that a tensor of one item among several may
    have (an image is three channels), whose rows are then not these; `ANY` is an axis of any length.
    Where tensors are ``batched``, those rows may be of one sample, behind its axis (`one_sample`).
    """

    kind: str
    rows: Sequence[Row]
    padded: int = 0
    grid: Grid | None = None
    vectors: bool = False
    single: tuple[tuple[int, ...], ...] = ()
    batched: bool = False

    @cached_property
    def length(self) -> int:
        """The number of rows, without padding."""
        return sum(row["rows"] for row in self.rows)

    @property
    def lengths(self) -> tuple[int, int]:
        """How many rows a tensor of this set can have."""
        return self.length, self.length + self.padded

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The rows of each entry."""
        return tuple(
            Span(row, row["first_row"], row["rows"], row.get("first_position"))
            for row in self.rows
            if row["rows"]
        )

    @cached_property
    def owners(self) -> tuple[tuple[Any, ...], ...] | None:
        """Whose the rows are, and how many follow each other; None where some may be taken back."""
        found: list[tuple[Any, ...]] = []
        for row, _, length, *_ in self.spans:
            if any(row.get(key) is not None for key in ("drafts", *DECIDED)):
                return None
            owner, before = (row["request_id"], row.get("sequence")), 0
            if found and found[-1][:2] == owner:
                before = found.pop()[2]
            found.append((*owner, before + length))
        return tuple(found)

    @cached_property
    def without_positions(self) -> RowSet:
        """The same owners, and nothing of where in their requests the rows are."""
        rows = [{key: value for key, value in row.items() if key != "first_position"} for row in self.rows]
        return replace(self, rows=rows)


# The kinds of rows that encoders have: items of a prompt, the tokens that stand for them, and their parts.
ITEMS, ITEM_TOKENS, ITEM_PARTS = ENCODED = ("items", "item_tokens", "item_parts")
# What is known of a request's rows only when its draft tokens are decided on.
DECIDED = ("accepted", "last")
NO_ROWS: tuple[RowSet, ...] = ()


def row_set_of(shape: Sequence[int], whole_numbers: bool, sets: Iterable[RowSet]) -> RowSet | None:
    """The one of a call's row sets that a tensor of this shape has; None where that is not certain."""
    return placed(shape, whole_numbers, sets)[0]


class Placed(NamedTuple):
    """A tensor's row set and its axis of positions; ``fits`` is whether any set might be the tensor's."""

    rows: RowSet | None
    axis: int
    fits: bool


# How long an axis of whole numbers before that of rows may be; None where nobody has said so.
BeforeRows = Sequence[int] | None


def placed(
    shape: Sequence[int], whole_numbers: bool, sets: Iterable[RowSet], before: BeforeRows = None
) -> Placed:
    """The one of a call's row sets that a tensor of this shape has, where that is certain, and its axis."""
    plain: list[RowSet] = []
    found: list[tuple[RowSet, int]] = []
    unclear = False
    for each in sets:
        axis = _axis_of(shape, whole_numbers, each)
        unclear |= axis == UNCLEAR
        if axis == 0 and each.grid is None:
            plain.append(each)
        elif axis is not None and axis != UNCLEAR:
            found.append((each, axis))
    flat = _flat_set_of(shape, whole_numbers, plain, before)
    if flat is not None:
        found.insert(0, (flat, 0))
    else:
        unclear |= any(shape and shape[0] in each.lengths for each in plain if each.length)
    if not found or unclear:
        return Placed(None, 0, unclear)
    (first, axis), *others = found
    if any((each.spans, each_axis) != (first.spans, axis) for each, each_axis in others):
        return Placed(None, 0, True)
    return Placed(first, axis, True)


def _axis_of(shape: Sequence[int], whole_numbers: bool, rows: RowSet) -> int | None:
    """Along which axis of a tensor the rows of a set may lie: `axis_of`; 0 where nothing else is known."""
    if rows.grid is not None:
        is_other = rows.kind == LOGITS and len(shape) != 3
        return None if is_other else axis_of(shape, whole_numbers, rows.grid)
    if not rows.batched:
        return 0
    axis = axis_in_sample(shape, whole_numbers, rows.lengths) if rows.length else None
    return UNCLEAR if axis and _may_be_one(shape, whole_numbers, rows) else axis


def _flat_set_of(
    shape: Sequence[int], whole_numbers: bool, sets: Iterable[RowSet], before: BeforeRows
) -> RowSet | None:
    if not shape:
        return None
    fitting = [each for each in sets if each.length and shape[0] in each.lengths]
    if not fitting or any(_may_be_one(shape, whole_numbers, each) for each in fitting):
        return None
    both = len(shape) == 2 and whole_numbers and shape[0] != 1 and shape[1] in fitting[0].lengths
    if both and (before is None or shape[0] in before):
        # Multimodal positions are (3, tokens): where the tokens are three, too, nobody can tell.
        return None
    return fitting[0] if len(fitting) == 1 else _in_common(fitting)


# In the shape of a single item's tensor: an axis of any length.
ANY = -1


def _may_be_one(shape: Sequence[int], whole_numbers: bool, rows: RowSet) -> bool:
    """Whether a tensor that has as many rows may be that of one request or item among several."""
    if rows.vectors and len(shape) == 1 and not whole_numbers:
        return True
    return any(
        len(each) == len(shape) and all(own in (ANY, axis) for own, axis in zip(each, shape, strict=True))
        for each in rows.single
    )


def _in_common(sets: Sequence[RowSet]) -> RowSet | None:
    """What holds whichever of the sets a tensor has: None where its rows might have other owners.

    Of images that are one part each, the rows are the images' or the parts': only the positions differ.
    """
    first = sets[0]
    if all(each.spans == first.spans for each in sets[1:]):
        return first
    if any(each.owners is None or each.owners != first.owners for each in sets):
        return None
    return first.without_positions


def is_whole_numbers(dtype: str) -> bool:
    """Whether a dtype, with or without ``torch.``, is of integers or truth values."""
    return dtype.removeprefix("torch.").startswith(("int", "uint", "bool"))


class CallRows:
    """The row sets of each call of one step and rank, as its ``step.json`` has them."""

    def __init__(self, document: Mapping[str, Any], accepted: Mapping[str, Row] | None = None) -> None:
        """``accepted`` is what other ranks know of the requests' accepted rows: `decided_positions`.

        Raises ValueError, with the damaged part, where the rows do not follow one another.
        """
        known = accepted or {}
        rows = [_with_accepted(row, known) for row in document.get("rows") or ()]
        padded, batched = int(document.get("padded_rows", 0)), bool(document.get("batched", False))
        own = RowSet("tokens", rows, padded, batched=batched)
        self._others = (_checked(own),) if rows else NO_ROWS
        self._listed: dict[str, tuple[RowSet, ...]] = {}
        self._whole: dict[str, frozenset[tuple[int, ...]]] = {}
        self._indices: dict[str, int] = {}
        self._before = _before_rows(document)
        # By row sets, which live as long as this.
        self._spans: dict[tuple[int, int], tuple[Span, ...]] = {}
        self._placed: dict[tuple[int, bool, tuple[int, ...]], Placed] = {}
        try:
            for entry in document.get("call_rows") or ():
                sets = tuple(map(_row_set, entry["sets"]))
                self._listed.update(dict.fromkeys(entry["calls"], sets))
                whole = frozenset(map(tuple, entry.get("whole", ())))
                self._whole.update(dict.fromkeys(entry["calls"], whole))
                self._indices.update(zip(entry["calls"], entry.get("indices", ()), strict=False))
        except (TypeError, KeyError) as error:
            raise ValueError(f"call_rows: {type(error).__name__}: {error}") from None

    def sets(self, call: str) -> tuple[RowSet, ...]:
        """The row sets of a call, by its directory."""
        return self._listed.get(call, self._others)

    def index(self, record: Mapping[str, Any]) -> int:
        """Which call of its module a record's is, counted within one call of the model."""
        found = self._indices.get(str(record["name"]).split("/")[1], record["call"])
        return int(found)

    def batch(self, record: Mapping[str, Any]) -> tuple[Grid, Sequence[Row]] | None:
        """The grid of a record's call and its rows; None unless there is one."""
        found = {each.grid: each.rows for each in self._around(record) if each.grid}
        ((grid, rows),) = found.items() if len(found) == 1 else ((None, ()),)
        return (grid, rows) if grid is not None and grid.length else None

    def layout(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        """The row sets of a record's call without their owners: what lies where."""
        keys = ("first_row", "rows", "first_position", "sequence")
        return tuple(
            (each.kind, each.grid, *(tuple(map(row.get, keys)) for row in each.rows))
            for each in self._around(record)
        )

    def _around(self, record: Mapping[str, Any]) -> Iterable[RowSet]:
        """The row sets of a record's call; of what experts sort, which is nobody's, those of all calls."""
        sets = self.sets(str(record["name"]).split("/")[1])
        if sets or not is_sorted(record):
            return sets
        return [
            *self._others,
            *chain.from_iterable({id(each): each for each in self._listed.values()}.values()),
        ]

    def spans(self, record: Mapping[str, Any]) -> tuple[Span, ...]:
        """Whose the rows of a record's tensor are; nothing where it is not known. Equal ones are the same."""
        found = self.placed(record)
        if found.rows is None:
            return ()
        key = id(found.rows), found.axis
        if key not in self._spans:
            self._spans[key] = tuple(span._replace(axis=found.axis) for span in found.rows.spans)
        return self._spans[key]

    def placed(self, record: Mapping[str, Any]) -> Placed:
        """The row set of a record's tensor, and how it lies there."""
        call, record = str(record["name"]).split("/")[1], presented(record)
        shape = tuple(record["shape"])
        if self._whole and shape in self._whole.get(call, ()):
            # Of this shape some tensor was stored whole where others have only the chosen rows.
            return Placed(None, 0, True)
        sets = NO_ROWS if is_sorted(record) else self.sets(call)
        key = id(sets), is_whole_numbers(str(record["dtype"])), shape
        found = self._placed.get(key)
        if found is None:
            found = self._placed[key] = placed(shape, key[1], sets, self._before)
        return found


def _before_rows(document: Mapping[str, Any]) -> BeforeRows:
    found = document.get("before_rows")
    if found is None:
        return None
    if not isinstance(found, list) or not all(type(each) is int and each >= 0 for each in found):
        raise ValueError(f"before_rows: {str(found)[:200]}")
    return tuple(found)


def _row_set(entry: Any) -> RowSet:
    grid = entry.get("grid")
    if grid is not None:
        grid = read_grid(grid)
    padded, vectors = int(entry.get("padded_rows", 0)), bool(entry.get("vectors", False))
    single = tuple(tuple(map(int, shape)) for shape in entry.get("single", ()))
    batched = bool(entry.get("batched", False))
    return _checked(RowSet(str(entry["kind"]), entry["rows"], padded, grid, vectors, single, batched))


def decided_positions(row: Row) -> dict[str, Any]:
    """What an entry knows of its request's drafts, as positions, for ranks that have other rows of it."""
    first = row.get("first_position", 0)
    return {key: first + row[key] for key in DECIDED if is_whole(first) and is_whole(row.get(key))}


def _with_accepted(row: Row, known: Mapping[str, Row]) -> Row:
    decided = known.get(str(row.get("request_id")), {})
    first = row.get("first_position", 0)
    if "accepted" in row or not decided or not is_whole(first):
        return row
    return {**row, **{key: max(0, position - first) for key, position in decided.items()}}


def _checked(rows: RowSet) -> RowSet:
    expected = 0
    for row in rows.rows:
        numbers = [row.get(key) for key in ("first_row", "rows")]
        numbers += [
            row[key] for key in ("first_position", "accepted", "drafts", "last") if row.get(key) is not None
        ]
        sound = isinstance(row.get("request_id"), str) and all(type(n) is int and n >= 0 for n in numbers)
        begins = row["first_row"] if sound else 0
        if not sound or (begins < expected if rows.grid is not None else begins != expected):
            raise ValueError(str(row)[:200])
        expected = row["first_row"] + row["rows"]
    if rows.grid is not None and expected > rows.grid.samples * rows.grid.length:
        raise ValueError(f"{expected} rows in {rows.grid}")
    return rows
