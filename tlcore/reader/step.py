"""A step of a stored run, read lazily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import MissingError, ReadError
from ..layout.checks import is_whole
from ..layout.grids import Grid
from ..layout.names import step_dir
from ..layout.rows import ENCODED, CallRows, Row, Span, decided_positions
from ..layout.templates import Structures, structures_of_texts
from ..layout.tokens import checked_tokens
from ..ledger import Counts
from ..record import Json
from ..statistics.summary import Statistics
from .call import Call, checked_call
from .described import described, statistics_of
from .documents import counts_of, is_tensor_name
from .lookup import not_one, not_stored, unstored, without_device
from .placements import as_whole, assembled, is_part
from .stored import Stored
from .tensor_stream import TensorStream, in_memory, open_stream
from .unshard import Places, group_of, joined, origin_of, records_of_ranks
from .wanted import STORED, Wanted, as_wanted

if TYPE_CHECKING:
    import torch

_TENSOR_FILE = ".pt"
_ENCODER = "encoder"


class Step(Mapping[str, "torch.Tensor"]):
    """One step of a run: a mapping from logical names to tensors, each loaded when asked for.

    ``ranks`` are those that have committed it, ``complete`` says whether these are all that took part.
    """

    def __init__(self, stored: Stored, number: int, ranks: list[int], complete: bool, places: Places) -> None:
        self._stored = stored
        self._places = places
        self.number = number
        self.ranks = ranks
        self.complete = complete

    @property
    def stored(self) -> Stored:
        """The run that it is of."""
        return self._stored

    @cached_property
    def documents(self) -> Mapping[int, Json]:
        """The ``step.json`` of each rank that has committed."""
        return {rank: self._stored.document(self.number, rank) for rank in self.ranks}

    @property
    def calls(self) -> list[str]:
        """The call directories in order of entry; of an uncommitted step, those that hold files."""
        ordered = dict.fromkeys(
            str(call) for document in self.documents.values() for call in document["calls"]
        )
        if not self.complete:
            ordered |= dict.fromkeys(sorted(_directory_of(name) for name in self._loose))
        return list(ordered)

    @cached_property
    def _records(self) -> dict[str, Json]:
        return records_of_ranks(self.documents, self._places)

    @cached_property
    def _by_origin(self) -> Mapping[tuple[Any, ...], Mapping[int, Json]]:
        """The records of each captured tensor, by rank."""
        found: dict[tuple[Any, ...], dict[int, Json]] = {}
        for record in self._records.values():
            found.setdefault(origin_of(record), {})[record["rank"]] = record
        return found

    @cached_property
    def _remains(self) -> Mapping[str, Json]:
        """The records of whole tensors that were left without being committed, by logical name."""
        return {} if self.complete else self._stored.remains(self.number)

    @cached_property
    def _loose(self) -> dict[str, None]:
        """The names of whole tensors that no committed rank lists."""
        found = self._remains
        return {name: None for name in found if self._is_own(name) and name not in self._records}

    def _is_own(self, name: str) -> bool:
        return is_tensor_name(name) and name.startswith(f"{step_dir(self.number)}/")

    @property
    def records(self) -> list[Json]:
        """The records of ``step.json``, with their ``rank`` added.

        A record of a tensor that is only a rank's part of one has ``part``: how the parts are joined.
        """
        return list(self._records.values())

    @property
    def names(self) -> list[str]:
        """The logical names of the stored tensors, in the order they were stored."""
        return [*self._records, *self._loose]

    @property
    def rows(self) -> list[Json] | None:
        """vLLM's request rows as the lowest rank saw them; None where there are none."""
        for document in self.documents.values():
            if "rows" in document:
                return list(document["rows"])
        return None

    @property
    def samples(self) -> list[Json]:
        """What is known of each request or sample that the step computed rows of: at least ``request_id``.

        Of vLLM's these are the `rows`. Outside vLLM a sample is one sequence of a batch.
        """
        found: dict[str, Json] = {}
        for document in self.documents.values():
            for entry in (*document.get("rows", ()), *document.get("samples", ())):
                if isinstance(entry, dict):
                    found.setdefault(str(entry.get("request_id")), entry)
        return list(found.values())

    @cached_property
    def token_entries(self) -> list[Json]:
        """The token ids that the step's documents have (`tlcore.layout.tokens`). Raises ReadError.

        ``kept`` is how many leading ids of an entry stayed in the request.
        """
        found = []
        for rank, document in self.documents.items():
            try:
                entries = list(checked_tokens(document))
            except ValueError as error:
                raise ReadError(f"{self._stored.url}: damaged tokens in step.json: {error}") from None
            found += [{**each, "kept": self._kept_ids(rank, each)} for each in entries]
        return found

    def _kept_ids(self, rank: int, entry: Mapping[str, Any]) -> int:
        count = len(entry["ids"])
        if "accepted" in entry or not entry.get("drafts"):
            return min(count, int(entry.get("accepted", count)))
        # Of drafts that this rank does not know of, another rank of the model may.
        sure = max(0, count - int(entry["drafts"]))
        for other, document in self.documents.items():
            if self.replica(other) != self.replica(rank):
                continue
            for row in document.get("rows", ()):
                if row.get("request_id") == entry["request_id"] and is_whole(row.get("accepted")):
                    end = row.get("first_position", 0) + row["accepted"]
                    sure = max(sure, min(count, end - int(entry["first_position"])))
        return sure

    def row_spans(self, record: Json) -> tuple[Span, ...]:
        """Whose the rows of a record's tensor are; nothing where that is not known. Raises ReadError.

        Of a tensor [samples, positions, ...], or with its positions along axis 2, they are those of the
        tensor with both axes joined in front (`tlcore.layout.rows.as_rows`); ``axis`` then says so. The rows
        of rejected draft tokens are among them: `Span.kept` leaves them out.
        """
        return self._call_rows[record["rank"]].spans(record)

    def sequence_of(self, record: Json) -> str:
        """Of which of a request's sequences a record's rows are that do not say so: ``encoder``, or empty.

        What an encoder works on (images) stands at positions of the prompt, and is none of its rows.
        """
        kind = getattr(self._call_rows[record["rank"]].placed(record).rows, "kind", "")
        return _ENCODER if kind in ENCODED else ""

    def fits_rows(self, record: Json) -> bool:
        """Whether a record's tensor may have rows of requests, known or not."""
        return self._call_rows[record["rank"]].placed(record).fits

    def batch_of(self, record: Json) -> tuple[Grid, Sequence[Row]] | None:
        """The batch of samples that a record's call was of, and its rows; None where that is not known."""
        return self._call_rows[record["rank"]].batch(record)

    def layout_of(self, record: Json) -> tuple[Any, ...]:
        """What is known of the rows of a record's call, whosever they are; empty where nothing is."""
        return self._call_rows[record["rank"]].layout(record)

    def index_in_model(self, record: Json) -> int:
        """Which call of its module a record's is, counted within one call of the model."""
        return self._call_rows[record["rank"]].index(record)

    @cached_property
    def _call_rows(self) -> Mapping[int, CallRows]:
        """The row sets of each rank's calls.

        Only a pipeline's last stage hears which draft tokens were kept.
        """
        accepted: dict[int, dict[str, Json]] = {}
        for rank, document in self.documents.items():
            known = accepted.setdefault(self.replica(rank), {})
            for row in document.get("rows", ()):
                if "accepted" in row:
                    known[str(row.get("request_id"))] = decided_positions(row)
        try:
            return {
                rank: CallRows(document, accepted[self.replica(rank)])
                for rank, document in self.documents.items()
            }
        except ValueError as error:
            raise ReadError(f"{self._stored.url}: damaged rows in step.json: {error}") from None

    @property
    def ledger(self) -> Counts:
        """The step's ledger, summed over ranks."""
        total = Counts()
        for document in self.documents.values():
            total.add(counts_of(document, self._stored.url))
        return total

    def has_record(self, name: str) -> bool:
        """Whether ``step.json`` describes this tensor; not so for what an uncommitted step left."""
        return name in self._records

    def holds(self, name: str) -> bool:
        """Whether the tensor's bytes are there, as far as can be seen without reading them."""
        return self._stored.holds(self.record(name))

    def payload(self, name: str, unshard: bool = False) -> TensorStream:
        """The tensor's values, to be read piece by piece. Raises MissingError or ReadError.

        With ``unshard``, a tensor of which each rank holds a part is joined first.
        """
        record = self.record(name)
        if unshard and ("part" in record or is_part(record)):
            return in_memory(self.tensor(name, unshard=True))
        return open_stream(self._stored, record)

    def replica(self, rank: int) -> int:
        """Which of the model's data-parallel replicas a rank belongs to."""
        return int(self._places.get(rank, {}).get("dp_rank", 0))

    @property
    def wholes(self) -> list[Json]:
        """A record for each tensor of the model, whichever ranks hold it, in the order of execution.

        That of a tensor in parts has the joined tensor's shape, and no hash. A tensor that every
        pipeline stage has counts where it comes in, or as a result where it leaves the last one.
        """
        chosen: dict[tuple[Any, ...], Json] = {}
        for rank in sorted(self.ranks, key=self._stage):
            if self._places.get(rank, {}).get("tp_rank", 0):
                continue
            for record in self.documents[rank]["records"]:
                own = self._records[record["name"]]
                key = (self.replica(rank), *origin_of(own))
                if key not in chosen or own["direction"] == "outputs":
                    chosen.pop(key, None)
                    chosen[key] = as_whole(own)
        return list(chosen.values())

    def stage(self, rank: int) -> int:
        """Which of the model's pipeline stages a rank belongs to: it takes what those before it computed."""
        return int(self._places.get(rank, {}).get("pp_rank", 0))

    def _stage(self, rank: int) -> tuple[int, int]:
        return self.stage(rank), rank

    @cached_property
    def described(self) -> list[Json]:
        """All tensors that were captured with their statistics, stored or not, in order of execution.

        Entries are like `records`, without a place and with ``stats`` and ``stored``. Empty where the run
        was captured with ``"capture": "tensor"``.
        """
        return described(self)

    @cached_property
    def stats(self) -> Mapping[str, Statistics]:
        """The statistics that were captured, by logical name."""
        return {entry["name"]: statistics_of(entry) for entry in self.described}

    def find(self, name: str) -> str:
        """The logical name of the stored tensor that ``name`` means.

        That is ``name`` itself, with or without ``.pt``, or the one tensor of rank 0 whose name is ``name``
        and its device. Raises MissingError, which says why where the tensor was seen but not stored.
        """
        if name in self._records:
            # So most are asked for.
            return name
        plain = name.removesuffix(_TENSOR_FILE)
        for exact in (name, plain):
            if exact in self:
                return exact
        meant = self._without_device.get(plain, ())
        if len(meant) == 1:
            return meant[0]
        entry = None if meant else self.unstored(plain)
        if entry is not None:
            raise not_stored(entry, self._stored.url)
        raise not_one(plain, meant, self.names, self._stored.url)

    @cached_property
    def _without_device(self) -> Mapping[str, Sequence[str]]:
        return without_device(self.names)

    def unstored(self, name: str) -> Json | None:
        """What is known of a tensor that was described but not stored; None for any other.

        It has ``name``, ``dtype``, ``shape``, ``device``, ``skipped`` (the reason), and ``stats`` if kept.
        """
        return unstored(self._stored, name) if name.startswith(f"{step_dir(self.number)}/") else None

    def record(self, name: str) -> Json:
        """The record of a tensor, by any name that `find` takes. Raises MissingError also if uncommitted."""
        found = self.find(name)
        if found in self._records:
            return self._records[found]
        raise MissingError(f"{self._stored.url}: {found!r} has no record, its step was not committed")

    def tensor(self, name: str, unshard: bool = False, dtype: Wanted = None) -> torch.Tensor:
        """The tensor with a logical name, or any that `find` takes, on the CPU.

        A distributed tensor (``DTensor``) is joined from all ranks' parts. With ``unshard``, so is a tensor
        of vLLM's of which each rank holds a part. ``dtype`` is that in which it is wanted, ``"original"``:
        what it had before ``store_dtype``, or ``"stored"``: whole rows with a scale as their bytes. Raises
        MissingError where one of the parts was not stored.
        """
        found = self.find(name)
        value = self._tensor(found, unshard, packed=dtype == STORED)
        return value if dtype is None else as_wanted(value, self._records.get(found, {}), dtype)

    def _tensor(self, found: str, unshard: bool, packed: bool) -> torch.Tensor:
        record = self._records.get(found)
        if record is None:
            return self._stored.tensor(self._remains[found])
        if is_part(record):
            return assembled(record, self._by_origin[origin_of(record)], self._stored.values)
        if not unshard or "part" not in record:
            return self._stored.values(record, packed)
        return joined(record["part"], list(map(self._stored.values, self.parts(found))), record["name"])

    def part(self, name: str, dtype: Wanted = None) -> torch.Tensor:
        """The tensor as one rank has it: of a distributed one, that rank's part. ``dtype`` as in `tensor`."""
        record = self.record(name)
        return as_wanted(self._stored.values(record, packed=dtype == STORED), record, dtype)

    def parts(self, name: str) -> list[Json]:
        """The records whose tensors make up a whole one, in order; the tensor's own if it is whole."""
        record = self.record(name)
        if "part" not in record:
            return [record]
        held = self._by_origin[origin_of(record)]
        group = group_of(self._places, record["rank"])
        absent = [str(rank) for rank in group if rank not in held]
        if absent:
            text = f"{record['name']}: the part of rank {', '.join(absent)} was not stored"
            raise MissingError(f"{self._stored.url}: {text}")
        return [held[rank] for rank in group]

    def call(self, directory: str, rank: int = 0) -> Call:
        """A call by its directory, such as ``layers.0_1``, or a first one's module. Raises MissingError."""
        directory = checked_call(directory, rank, self, self._stored.url)
        return Call(self, self._stored, directory, rank)

    def structures(self, rank: int) -> dict[str, Json]:
        """A rank's structures by names that leave out the rank, such as ``layers.0/inputs.json``.

        They come in the order of the records, so that every format gives the same order.
        """
        order = self._structure_order(rank)
        return dict(zip(order, self._stored.structures(self.number, rank, order), strict=True))

    def structure_texts(self, rank: int) -> Structures:
        """The same as texts, from which each is made when it is asked for."""
        order = self._structure_order(rank)
        texts = self._stored.structure_texts(self.number, rank, order)
        return structures_of_texts(step_dir(self.number), dict(zip(order, texts, strict=True)))

    def _structure_order(self, rank: int) -> list[str]:
        found = set(self._stored.structure_names(self.number, rank))
        ordered = dict.fromkeys(
            f"{str(record['name']).partition('/')[2].rpartition('/')[0]}/{record.get('direction')}.json"
            for record in self.documents[rank]["records"]
        )
        order = [name for name in ordered if name in found]
        return order + sorted(found - ordered.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def __contains__(self, name: object) -> bool:
        # The mapping's own test would load the tensor.
        return isinstance(name, str) and (name in self._records or name in self._loose)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        return f"<Step {self.number} of {self._stored.url}: {len(self)} tensors{state}>"


def _directory_of(name: str) -> str:
    return name.split("/")[1]
