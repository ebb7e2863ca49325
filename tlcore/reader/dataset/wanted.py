"""The records of a run's steps that rows are wanted of; of steps that are alike they are looked up once."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from ...layout import names as naming
from ...layout.rows import Span
from ...record import Json
from ..outlines import OutlinedStep, has_outlines, outlined
from ..placements import is_part
from ..request import name_in_model
from ..step import Step

if TYPE_CHECKING:
    from ..run import Run

_REMOTE_THREADS = 8
ENCODER = "@encoder"
# Entries of steps that are kept for others like them.
_MOST_KEPT = 1 << 18


class Entry:
    """A record whose rows are those of the name with this ``number``.

    It may be that of another step, of which only the name's step, the hash and the place differ; ``axes`` are
    those along which its rows' form was looked at.
    """

    __slots__ = ("axes", "key", "number", "record")

    def __init__(self, number: int, record: Json) -> None:
        self.number, self.record = number, record
        self.key = str(record["name"]).partition("/")[2]
        self.axes: set[int] = set()


class Spans(NamedTuple):
    """The rows that a record has of requests: columns, with the place of the first row in the record."""

    requests: list[str]
    first: list[int]
    length: list[int]
    begin: list[int]
    # Whether some, and whether others, are of an encoder.
    of_encoder: set[bool]
    # Whether each request stands there once.
    plain: bool


class WantedRecords:
    """Finds the records of ``names``, which may leave out the device, and end in ``@encoder``.

    ``seen`` are the names that there are, without devices.
    """

    def __init__(self, run: Run, names: Sequence[str]) -> None:
        self._of_vllm = bool(run.ranks)
        self._names: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            self._names.setdefault(name.removesuffix(ENCODER), []).append(number)
        self.seen: dict[str, None] = {}
        self._known: dict[Hashable, tuple[Any, list[Entry]]] = {}
        self._kept = 0

    def of(self, step: Step) -> Sequence[Entry]:
        """The entries of a step. Raises ReadError."""
        if not isinstance(step, OutlinedStep):
            return list(self._find(step))
        # What else decides which records count, and how they are called.
        depends = {rank: (each.get("sharding"), _indices(each)) for rank, each in step.documents.items()}
        known = self._known.get(step.alike)
        if known is None or known[0] != depends:
            known = depends, list(self._find(step.whole))
            self._keep(step.alike, known)
        return known[1]

    def _keep(self, alike: Hashable, known: tuple[Any, list[Entry]]) -> None:
        self._kept += len(known[1])
        if self._kept > _MOST_KEPT:
            self._known, self._kept = {}, len(known[1])
        self._known[alike] = known

    def _find(self, step: Step) -> Iterator[Entry]:
        records = step.wholes if self._of_vllm or any(map(is_part, step.records)) else step.records
        modules = frozenset(str(record["module"]) for record in step.records)
        for record in records:
            own = name_in_model(step, record, modules)
            short = _without_device(own, record)
            self.seen[short] = None
            for name in dict.fromkeys((own, short)):
                for number in self._names.get(name, ()):
                    yield Entry(number, record)


def _indices(document: Json) -> Any:
    """What a document, from anybody, says of the calls' numbers within one call of the model."""
    listed = document.get("call_rows")
    if not isinstance(listed, list):
        return listed
    return [
        (each.get("calls"), each["indices"])
        for each in listed
        if isinstance(each, dict) and "indices" in each
    ]


def columns_of(spans: Sequence[Span], encoder: bool) -> Spans:
    """The rows with a position, as columns; with ``encoder`` those of encoders alone."""
    found: list[tuple[str, int, int, int]] = []
    kinds: set[bool] = set()
    for span in spans:
        row, begin, length, first, _ = span if _is_kept(span.row) else span.kept()
        if not length or first is None:
            continue
        of_encoder = bool(row.get("sequence"))
        kinds.add(of_encoder)
        if of_encoder or not encoder:
            found.append((str(row["request_id"]), first, length, begin))
    requests = [each[0] for each in found]
    firsts, lengths, begins = ([each[1:][at] for each in found] for at in range(3))
    return Spans(requests, firsts, lengths, begins, kinds, len(set(requests)) == len(requests))


def _is_kept(row: Mapping[str, Any]) -> bool:
    """Whether all of an entry's rows are of tokens that stayed (`Span.kept`)."""
    return row.get("accepted") is None and row.get("last") is None and not row.get("drafts")


def steps_of(run: Run, numbers: Sequence[int], done: Collection[int]) -> Iterator[Step]:
    """Whole steps with their documents, but for those that are ``done`` when it is their turn.

    Of a remote run several are on their way at a time.
    """
    outlines = has_outlines(run.stored)

    def opened(number: int) -> Step:
        return outlined(run, number) if outlines else run.step(number)

    if run.stored.is_local:
        yield from (opened(number) for number in numbers if number not in done)
        return
    with ThreadPoolExecutor(_REMOTE_THREADS, "tlcore-read") as pool:
        for begin in range(0, len(numbers), 4 * _REMOTE_THREADS):
            steps = list(map(opened, numbers[begin : begin + 4 * _REMOTE_THREADS]))
            list(pool.map(_asked_for, steps))
            yield from (step for step in steps if step.number not in done)


def _asked_for(step: Step) -> None:
    """Have what is first asked of a step."""
    _ = step.kin if isinstance(step, OutlinedStep) else step.documents


def _without_device(name: str, record: Json) -> str:
    """A name without what tells the device and the rank."""
    return name.removesuffix(f"_{naming.device_label(str(record['device']), int(record['rank']))}")
