"""One request, or sample of a batch, across the steps of a run: its rows of every tensor by position."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import MissingError, ReadError, missing
from ..layout import names
from ..layout.dtypes import name_of, torch_dtype
from ..layout.grids import as_rows
from ..layout.names import PathKey
from ..layout.row_scale import presented
from ..layout.rows import ENCODED, Span, adapter_of
from ..record import Json
from .chosen_rows import ChosenRows, read_chosen
from .described import tensors_in
from .lookup import without_device
from .placements import as_whole, is_part
from .request_tokens import Part, RequestTokens
from .step import Step
from .wanted import Wanted

if TYPE_CHECKING:
    import torch


class Gap(NamedTuple):
    """Positions ``begin`` to ``end`` (without it) that a tensor has no row for.

    ``reason`` is ``prefix cache`` (never computed, vLLM had them) or ``not captured``.
    """

    begin: int
    end: int
    reason: str


class _Place(NamedTuple):
    step: Step
    name: str
    span: Span
    first: int


# The logical name without its step, and the sequence: empty, or `encoder`.
_Key = tuple[str, str]


class Request(Mapping[str, "torch.Tensor"]):
    """A request: a mapping from logical names without their step to tensors, a row for each position.

    The rows come in the order of `positions`. Of a position that was computed several times, as after a
    preemption, the last computation counts: the tokens that follow were made from it. Rows of draft tokens
    that were rejected are left out, and so is what is not known to be this request's.

    Outside vLLM a request is a sample, and the call of a module is counted within the model's call: a name
    means the same tensor in each call of a generation, in a step of its own or not. A tensor that
    an encoder and the model behind it both have ends in ``@encoder`` where its rows are of what the encoder
    was given.
    """

    def __init__(self, run_url: str, request_id: str, external_id: str | None, steps: Sequence[Step]) -> None:
        self._url = run_url
        self.request_id = request_id
        self.external_id = external_id
        self._cached = 0
        # What adapter (LoRA) the model had on for it; None for none.
        self.adapter: str | None = None
        # Of tensors of which single rows were asked for: where these are, and their shape.
        self._rows: dict[str, tuple[dict[int, tuple[_Place, int]], tuple[int, ...], str]] = {}
        self.tokens = RequestTokens(f"{run_url}: request {request_id}")
        found: dict[_Key, list[_Place]] = defaultdict(list)
        self.steps: list[int] = []
        self._steps: list[Step] = []
        for step in steps:
            self._look_at(step, found)
        self._places = {
            f"{name}@{sequence}" if sequence and (name, "") in found else name: places
            for (name, sequence), places in found.items()
        }

    def _look_at(self, step: Step, found: dict[_Key, list[_Place]]) -> None:
        own = [
            row
            for document in step.documents.values()
            for row in (*document.get("rows", ()), *document.get("samples", ()))
            if row["request_id"] == self.request_id
        ]
        self.tokens.add(
            step.number, (each for each in step.token_entries if each["request_id"] == self.request_id)
        )
        if not own:
            return
        self.steps.append(step.number)
        self._steps.append(step)
        self._cached = max(self._cached, *(int(row.get("cached", 0)) for row in own))
        self.adapter = next(filter(None, map(adapter_of, own)), self.adapter)
        modules = frozenset(str(record["module"]) for record in step.records)
        # Most tensors of a step have the same rows.
        known: dict[int, tuple[Sequence[Span], list[Span]]] = {}
        for record in step.records:
            spans = step.row_spans(record)
            if id(spans) not in known:
                known[id(spans)] = spans, self._own_spans(spans)
            its = known[id(spans)][1]
            usual = step.sequence_of(record) if its else ""
            for span in its:
                if span.first is not None:
                    key = name_in_model(step, record, modules), str(span.row.get("sequence", usual))
                    found[key].append(_Place(step, record["name"], span, span.first))

    def _own_spans(self, spans: Sequence[Span]) -> list[Span]:
        """What of a tensor's rows is this request's, and stayed in it."""
        own = (span.kept() for span in spans if span.row["request_id"] == self.request_id)
        return [span for span in own if span.length]

    @property
    def url(self) -> str:
        """The run's directory."""
        return self._url

    @property
    def names(self) -> list[str]:
        """Names such as ``model.layers.0/outputs_0_cpu``, in the order of execution."""
        return list(self._places)

    @property
    def token_ids(self) -> torch.Tensor:
        """The token ids of all positions from 0 on, [positions], int64: the prompt's, then generated ones.

        The token that was sampled last is none of them, as the model was never given it. `tokens` has more:
        the ids at some positions, the rejected drafts. Raises MissingError where no ids were captured,
        ReadError where some in between were not.
        """
        return self.tokens.tensor()

    def token_ids_of(self, name: str) -> torch.Tensor:
        """The token ids of a tensor's rows, [rows], int64. Raises ReadError where one is not known."""
        return self.tokens.tensor(self.positions(name))

    @property
    def prompt_length(self) -> int | None:
        """How many of the positions are the prompt's; None where that is not known."""
        return self.tokens.prompt_length

    def text(self, tokenizer: Any, part: Part = "all") -> str:
        """What a tokenizer (with ``decode``) makes of `token_ids`: of all, of the prompt, or of the response.

        Raises as `token_ids` does, and ReadError where the prompt's length is needed and not known.
        """
        return self.tokens.text(tokenizer, part)

    def positions(self, name: str) -> list[int]:
        """The position in the request of each row of a tensor, in order."""
        return sorted(self._newest(name))

    def recomputed(self, name: str) -> list[int]:
        """Positions of a tensor that were computed and captured more than once."""
        times: dict[int, int] = defaultdict(int)
        for place in self._of(name):
            for position in range(place.first, place.first + place.span.length):
                times[position] += 1
        return sorted(position for position, count in times.items() if count > 1)

    def gaps(self, name: str) -> list[Gap]:
        """The positions before a tensor's last one that it has no row for."""
        found: list[Gap] = []
        expected = 0
        for position in self.positions(name):
            found += self._gap(expected, position)
            expected = position + 1
        return found

    def _gap(self, begin: int, end: int) -> Iterator[Gap]:
        border = min(max(begin, self._cached), end)
        if begin < border:
            yield Gap(begin, border, "prefix cache")
        if border < end:
            yield Gap(border, end, "not captured")

    def tensor(self, name: str, unshard: bool = False, dtype: Wanted = None) -> torch.Tensor:
        """A tensor's rows of this request, over all steps; with ``unshard`` the ranks' parts are joined.

        ``name`` is one of `names`, or leaves out the device, and then means rank 0's tensor.
        ``dtype`` is that in which they are wanted, or ``"original"``: what they had before ``store_dtype``.

        Raises MissingError for a name that is not there, ReadError where rows of two steps differ in shape.
        """
        return self._joined(name, self._newest(name), unshard, dtype)

    def _joined(
        self,
        name: str,
        rows_of: Mapping[int, tuple[_Place, int]],
        unshard: bool = False,
        dtype: Wanted = None,
    ) -> torch.Tensor:
        import torch

        runs = list(_in_runs(rows_of))
        chosen = _read_alone(runs, unshard) if dtype is None else None
        if chosen is not None:
            return chosen
        pieces: list[torch.Tensor] = []
        last: _Place | None = None
        for place, rows in runs:
            if place is not last:
                last, whole = place, as_rows(place.step.tensor(place.name, unshard, dtype), place.span.axis)
            pieces.append(whole[rows])
        if any(each.shape[1:] != pieces[0].shape[1:] for each in pieces):
            shapes = sorted({tuple(each.shape[1:]) for each in pieces})
            raise ReadError(f"{self._url}: {name} has rows of the shapes {shapes}, which cannot be joined")
        return torch.cat(pieces)

    def dtype_and_shape(self, name: str, unshard: bool = False) -> tuple[str, list[int]]:
        """The dtype and shape of `tensor`, as the records have them: no tensor is read.

        Raises as `tensor` does, but for what only the tensors themselves tell.
        """
        newest = self._newest(name)
        places = {id(place): place for place, _ in newest.values()}
        rows = {_row_kind(place, unshard) for place in places.values()}
        shapes = sorted({shape for _, shape in rows})
        if len(shapes) > 1:
            raise ReadError(f"{self._url}: {name} has rows of the shapes {shapes}, which cannot be joined")
        return _promoted(sorted({dtype for dtype, _ in rows})), [len(newest), *shapes[0]]

    @functools.cached_property
    def outputs(self) -> Mapping[tuple[str, tuple[PathKey, ...], int], str]:
        """The names of results, by the call's directory, the way into its result, and the rank."""
        found = {}
        for name, places in self._places.items():
            record = places[0].step.record(places[0].name)
            if record["direction"] == "outputs" and "@" not in name:
                found[name.split("/")[0], tuple(record["path"]), int(record["rank"])] = name
        return found

    def call_of(self, name: str) -> tuple[str, int]:
        """The module of a tensor, and which of its calls in a step it is of."""
        place = self._of(name)[0]
        record = place.step.record(place.name)
        return str(record["module"]), int(record["call"])

    def is_of_items(self, name: str) -> bool:
        """Whether a tensor is an encoder's, which has rows of items (images) alone."""
        place = self._of(name)[0]
        return any(kind in ENCODED for kind, *_ in place.step.layout_of(place.step.record(place.name)))

    def left_out(self, directory: str, path: tuple[PathKey, ...], rank: int) -> bool:
        """Whether a call's result on a rank was described in a step, and not stored. Raises ReadError."""
        return any(
            known == path and "skipped" in node
            for step in self._steps
            for known, node in tensors_in(_outputs_of(step, directory, rank))
        )

    def has_row(self, name: str, position: int) -> bool:
        """Whether there is a tensor's row of a position. Raises as `dtype_and_shape` does."""
        return position in self._single(name)[0]

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one row of a tensor. Raises as `dtype_and_shape` does."""
        return self._single(name)[1]

    def row_dtype(self, name: str) -> str:
        """The dtype of a tensor's rows. Raises as `dtype_and_shape` does."""
        return self._single(name)[2]

    def rows_at(self, name: str, positions: Iterable[int]) -> torch.Tensor:
        """A tensor's rows of these positions, which it has, in ascending order. Raises as `tensor` does."""
        newest = self._single(name)[0]
        return self._joined(name, {position: newest[position] for position in positions})

    def _single(self, name: str) -> tuple[dict[int, tuple[_Place, int]], tuple[int, ...], str]:
        """What `_rows` has of a tensor; of whole tensors it would be more than can be kept."""
        found = self._rows.get(name)
        if found is None:
            dtype, shape = self.dtype_and_shape(name)
            found = self._rows[name] = self._newest(name), tuple(shape[1:]), dtype
        return found

    def _of(self, name: str) -> list[_Place]:
        if name in self._places:
            return self._places[name]
        meant = without_device(self._places).get(name, ())
        if len(meant) == 1:
            return self._places[meant[0]]
        raise missing("tensor with rows", name, f"request {self.request_id} of {self._url}", self._places)

    def _newest(self, name: str) -> dict[int, tuple[_Place, int]]:
        """For each position the place of its last computation, and the row there."""
        newest: dict[int, tuple[_Place, int]] = {}
        for place in self._of(name):
            for offset in range(place.span.length):
                newest[place.first + offset] = (place, place.span.begin + offset)
        return newest

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<Request {self.request_id} of {self._url}, steps {self.steps}>"


def _outputs_of(step: Step, directory: str, rank: int) -> Json:
    try:
        return step.call(directory, rank).structure("outputs")
    except MissingError:
        return {}


def _row_kind(place: _Place, unshard: bool) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape of a row, as its step's tensor is read."""
    record = place.step.parts(place.name)[0] if unshard else place.step.record(place.name)
    whole = presented(as_whole(record) if unshard or is_part(record) else record)
    axis = place.span.axis
    return name_of(whole["dtype"]), tuple(size for i, size in enumerate(whole["shape"]) if i not in (0, axis))


def _promoted(dtypes: Sequence[str]) -> str:
    """The dtype of tensors of these put together."""
    if len(dtypes) == 1:
        return dtypes[0]
    import torch

    known = [torch_dtype(each) for each in dtypes]
    return name_of(functools.reduce(torch.promote_types, [each for each in known if each is not None]))


def name_in_model(step: Step, record: Mapping[str, Any], modules: frozenset[str]) -> str:
    """A record's logical name without its step, as if the model had been called once in it."""
    _, directory, file = str(record["name"]).split("/", 2)
    index = step.index_in_model(dict(record))
    if index != record["call"]:
        directory = names.call_dir(str(record["module"]), index, modules)
    return f"{directory}/{file}"


def _in_runs(newest: Mapping[int, tuple[_Place, int]]) -> Iterator[tuple[_Place, slice]]:
    """The rows in the order of positions, neighbours in one place together."""
    current: tuple[_Place, int, int] | None = None
    for position in sorted(newest):
        place, row = newest[position]
        if current is not None and current[0] is place and current[2] == row:
            current = (place, current[1], row + 1)
            continue
        if current is not None:
            yield current[0], slice(current[1], current[2])
        current = (place, row, row + 1)
    if current is not None:
        yield current[0], slice(current[1], current[2])


def _read_alone(runs: Sequence[tuple[_Place, slice]], unshard: bool) -> torch.Tensor | None:
    """The rows, of which nothing else is read; None where whole tensors have to be."""
    pieces = [
        ChosenRows(
            place.step.number,
            place.step.record(place.name),
            place.span.axis,
            rows.start,
            rows.stop - rows.start,
        )
        for place, rows in runs
    ]
    return read_chosen(runs[0][0].step.stored, pieces, unshard) if runs else None
