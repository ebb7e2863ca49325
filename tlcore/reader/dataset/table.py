"""Whose rows lie where: one pass over a run's steps, kept as columns of numbers."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ...errors import MissingError, ReadError, missing
from ...layout.checks import LARGEST_SIZE
from ...layout.dtypes import item_size
from ...layout.row_scale import presented
from ...layout.rows import adapter_of
from ..lookup import without_device
from ..outlines import OutlinedStep
from ..request_ids import rows_take, why_unknown
from ..step import Step
from .kin import Kin, KinRows
from .places import row_form
from .series import KinSteps, Series
from .sources import Sources
from .tokens import Numbers, Tokens
from .wanted import ENCODER, Entry, Spans, WantedRecords, columns_of, steps_of

if TYPE_CHECKING:
    from ..run import Run

# Of one request in one step. A run may come from anybody: no memory is taken for rows that are only claimed.
_MOST_ROWS = 1 << 26


class Form(NamedTuple):
    """What all rows of a tensor have in common."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Pieces:
    """Rows that lie together: of one request, at positions that follow one another, in one step.

    Columns of equal length; ``source`` and ``begin`` have a column for each tensor.
    """

    request: Numbers
    first: Numbers
    length: Numbers
    source: Numbers
    begin: Numbers

    def take(self, chosen: Any) -> Pieces:
        """The chosen ones, by mask or by number."""
        columns = (self.request, self.first, self.length, self.source, self.begin)
        return Pieces(*(column[chosen] for column in columns))

    def cut(self, before: Numbers, length: Numbers) -> Pieces:
        """Each without so many rows before, and with so many rows from there on; empty ones are left out."""
        begin = self.begin + before[:, None]
        cut = Pieces(self.request, self.first + before, length, self.source, begin)
        return cut.take(length > 0)


class _Block(NamedTuple):
    """A record's rows: those of ``spans`` in a source, ``begin`` rows behind its first."""

    spans: Spans
    source: int
    begin: int


class _Part(NamedTuple):
    first: int
    length: int
    source: int
    begin: int


class Table:
    """The rows that a run has of some tensors, in the order of its steps.

    ``names`` may leave out the device, and end in ``@encoder`` as in `Request`. Only rows that every one of
    them has in the same step are there. Raises MissingError for a name without rows, ReadError where rows of
    one are not all of the same form.
    """

    def __init__(self, run: Run, names: Sequence[str]) -> None:
        self.url = run.url
        self.names = list(names)
        self.forms: list[Form] = []
        self.requests: list[str] = []
        self.tokens: dict[str, Tokens] = {}
        self.adapters: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._of_encoder = [name.endswith(ENCODER) for name in names]
        self._forms: list[Form | None] = [None] * len(self.names)
        # Of a tensor with rows of both, those of the decoder are meant.
        self._why_not: str | None = None
        self._encoder: list[set[bool]] = [set() for _ in self.names]
        self.sources = Sources(run)
        self._columns: tuple[array[int], ...] = tuple(array("q") for _ in range(3))
        self._places = array("q")
        wanted, kin, series = WantedRecords(run, names), Kin(len(self.names)), Series(run)
        try:
            for step in steps_of(run, series.numbers, series.done):
                known = kin.find(step) if isinstance(step, OutlinedStep) else None
                if known is None or not self._take(series.of(cast(OutlinedStep, step), known), known):
                    self._look_at(step, wanted.of(step), kin)
        except OverflowError:
            raise ReadError(f"{run.url}: a step has numbers that are no positions or token ids") from None
        self.sources.forget_steps()
        self._check(wanted.seen)
        self.pieces = self._newest()
        del self._columns, self._places

    def _take(self, steps: KinSteps, known: KinRows) -> bool:
        """Add the rows of steps that are like others but for their numbers; False where there are none."""
        count = len(steps.steps)
        if not count:
            return False
        for rank, each in known.numbers.items():
            own = steps.numbers[rank]
            for request, prompt, first, ids in each.tokens:
                tokens = self.tokens.setdefault(request, Tokens())
                tokens.add_several(
                    own[:, first], own[:, ids], None if prompt is None else int(own[0, prompt])
                )
        spans = known.spans
        requests = np.tile(np.array(list(map(self._number, spans.requests)), np.int64), count)
        firsts = steps.numbers[known.rank][:, known.positions]
        lengths = np.tile(np.array(spans.length, np.int64), count)
        for column, values in zip(self._columns, (requests, firsts, lengths), strict=True):
            column.frombytes(values.tobytes())
        places = np.empty((count, len(spans.begin), len(known.entries), 2), np.int64)
        within = np.array(spans.begin, np.int64)[None, :]
        for number, entry in enumerate(known.entries):
            source, begin = self.sources.of_several(steps.steps, entry)
            places[:, :, number, 0] = source[:, None]
            places[:, :, number, 1] = begin[:, None] + within
        self._places.frombytes(places.tobytes())
        return True

    def _look_at(self, step: Step, entries: Sequence[Entry], kin: Kin) -> None:
        self._why_not = self._why_not or why_unknown(step)
        for row in step.samples:
            adapter = adapter_of(row)
            if adapter is not None:
                self.adapters[str(row.get("request_id"))] = adapter
        for told in step.token_entries:
            if not told.get("sequence"):
                tokens = self.tokens.setdefault(str(told["request_id"]), Tokens())
                tokens.add(told["first_position"], told["ids"][: told["kept"]], told.get("prompt"))
        self.sources.expect(entries)
        blocks: list[list[_Block]] = [[] for _ in self.names]
        known: dict[tuple[int, bool], tuple[Any, Spans]] = {}
        for entry in entries:
            self._add(step, entry, blocks[entry.number], known)
        if self._join(blocks) and isinstance(step, OutlinedStep):
            kin.note(step, entries, blocks[0][0].spans)

    def _add(
        self,
        step: Step,
        entry: Entry,
        blocks: list[_Block],
        known: dict[tuple[int, bool], tuple[Any, Spans]],
    ) -> None:
        """Note a record's rows; ``known`` are those of the step's other records, with what they are of."""
        number, record = entry.number, entry.record
        spans = step.row_spans(record)
        if not spans:
            return
        key = id(spans), self._of_encoder[number]
        if key not in known:
            known[key] = spans, columns_of(spans, self._of_encoder[number])
        own = known[key][1]
        self._encoder[number] |= own.of_encoder
        if not own.requests:
            return
        if max(own.length) > _MOST_ROWS:
            raise ReadError(f"{self.url}: {record['name']!r} has {max(own.length)} rows of one request")
        axis = spans[0].axis
        source, begin = self.sources.of(step.number, entry, axis)
        if axis not in entry.axes:
            shown = presented(record)
            form = Form(str(shown["dtype"]), row_form(shown["shape"], axis))
            if not prod(form.shape) or item_size(form.dtype) is None:
                raise ReadError(f"{self.url}: {record['name']!r} has rows without values")
            self._check_form(number, form)
            entry.axes.add(axis)
        blocks.append(_Block(own, source, begin))

    def _check_form(self, number: int, form: Form) -> None:
        known = self._forms[number]
        if known is None:
            self._forms[number] = form
        elif known != form:
            shown = f"{known.dtype} {list(known.shape)} and {form.dtype} {list(form.shape)}"
            raise ReadError(f"{self.url}: {self.names[number]!r} has rows of different forms ({shown})")

    def _check(self, seen: Mapping[str, None]) -> None:
        for number, name in enumerate(self.names):
            form = self._forms[number]
            if form is None:
                raise self._without_rows(name, seen)
            if self._encoder[number] == {False, True} and not self._of_encoder[number]:
                hint = f"; name {name}{ENCODER} for those of the encoder alone"
                raise ReadError(f"{self.url}: {name!r} has rows of encoder and decoder{hint}")
            self.forms.append(form)

    def _without_rows(self, name: str, seen: Mapping[str, None]) -> MissingError:
        plain = name.removesuffix(ENCODER)
        if plain in seen or any(short in seen for short in without_device([plain])):
            problem = f"no rows of {name!r} are known to be a request's; {rows_take(self._why_not)}"
            return MissingError(f"{self.url}: {problem}")
        return missing("tensor with rows of requests", name, self.url, seen)

    def _join(self, blocks: Sequence[list[_Block]]) -> bool:
        """Add the positions that every tensor has a row of in this step; whether they lie alike in all."""
        if not all(blocks):
            return False
        spans = blocks[0][0].spans
        if spans.plain and all(len(each) == 1 and each[0].spans is spans for each in blocks):
            self._append_all(spans, [each[0] for each in blocks])
            return True
        parts = [_by_request(each) for each in blocks]
        for request in parts[0]:
            self._join_one(request, [each.get(request, []) for each in parts])
        return False

    def _append_all(self, spans: Spans, blocks: Sequence[_Block]) -> None:
        """Add rows that lie alike in all tensors."""
        if max(spans.first) > LARGEST_SIZE:
            raise OverflowError
        numbers = list(map(self._number, spans.requests))
        for column, values in zip(self._columns, (numbers, spans.first, spans.length), strict=True):
            column.extend(values)
        places = np.empty((len(numbers), len(blocks), 2), np.int64)
        places[:, :, 0] = [each.source for each in blocks]
        begins = np.array([each.begin for each in blocks], np.int64)
        places[:, :, 1] = begins + np.array(spans.begin, np.int64)[:, None]
        self._places.frombytes(places.tobytes())

    def _join_one(self, request: str, parts: Sequence[list[_Part]]) -> None:
        if all(len(each) == 1 and each[0][:2] == parts[0][0][:2] for each in parts):
            self._append(request, *parts[0][0][:2], [each[0] for each in parts])
            return
        rows: list[dict[int, tuple[int, int]]] = []
        for each in parts:
            own: dict[int, tuple[int, int]] = {}
            for first, length, source, begin in each:
                own.update({first + at: (source, begin + at) for at in range(length)})
            rows.append(own)
        for position in sorted(set(rows[0]).intersection(*rows[1:])):
            self._append(request, position, 1, [_Part(position, 1, *own[position]) for own in rows])

    def _append(self, request: str, first: int, length: int, parts: Sequence[_Part]) -> None:
        if first > LARGEST_SIZE:
            raise OverflowError
        for column, value in zip(self._columns, (self._number(request), first, length), strict=True):
            column.append(value)
        for part in parts:
            self._places.extend((part.source, part.begin))

    def _number(self, request: str) -> int:
        number = self._numbers.setdefault(request, len(self._numbers))
        if number == len(self.requests):
            self.requests.append(request)
        return number

    def _newest(self) -> Pieces:
        """The pieces, without what was computed again later: the tokens that follow were made from that."""
        request, first, length = (np.array(column, dtype=np.int64) for column in self._columns)
        places = np.array(self._places, dtype=np.int64).reshape(-1, len(self.names), 2)
        pieces = Pieces(request, first, length, places[:, :, 0], places[:, :, 1])
        order = np.lexsort((first, request))
        ends = (first + length)[order]
        again = (request[order][1:] == request[order][:-1]) & (first[order][1:] < ends[:-1])
        twice = np.unique(request[order][1:][again])
        if not len(twice):
            return pieces
        plain = ~np.isin(request, twice)
        parts = [pieces.take(plain), *(_newest_of(pieces.take(request == each)) for each in twice)]
        return Pieces(*(np.concatenate(columns) for columns in zip(*map(_columns, parts), strict=True)))


def _by_request(blocks: Sequence[_Block]) -> dict[str, list[_Part]]:
    found: dict[str, list[_Part]] = {}
    for spans, source, at in blocks:
        rows = zip(spans.requests, spans.first, spans.length, spans.begin, strict=True)
        for request, first, length, begin in rows:
            found.setdefault(request, []).append(_Part(first, length, source, at + begin))
    return found


def _columns(pieces: Pieces) -> tuple[Numbers, ...]:
    return pieces.request, pieces.first, pieces.length, pieces.source, pieces.begin


def _newest_of(pieces: Pieces) -> Pieces:
    """Of one request's pieces, in the order of steps, each position's last row, as a piece of its own."""
    newest: dict[int, tuple[int, int]] = {}
    for number, (first, length) in enumerate(zip(pieces.first.tolist(), pieces.length.tolist(), strict=True)):
        newest.update({first + at: (number, at) for at in range(length)})
    positions = sorted(newest)
    chosen = np.array([newest[position][0] for position in positions], dtype=np.int64)
    before = np.array([newest[position][1] for position in positions], dtype=np.int64)
    return pieces.take(chosen).cut(before, np.ones_like(before))
