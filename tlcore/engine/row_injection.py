"""Results of another run in the place of a model's own, where a batch has rows of several requests."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..config.configuration import Inject
from ..errors import ConfigError, ReadError
from ..layout.dtypes import torch_dtype
from ..layout.rows import ENCODED, Span
from ..reader.request import Request
from ..reader.run import Run
from ..reader.unshard import places_of
from ..record import Json, RunInfo
from .filters.modules import ModuleFilter
from .filters.rows import Given, StepRows
from .injected_dtypes import conversion, rounding, unlike
from .injected_values import CallArguments, Path, UnlikeError, with_each_tensor
from .injecting_ranks import NO_GROUP, Group, groups_of
from .injection import Injection

log = logging.getLogger("tlcore")
_OF_THE_SAME = "Inject a run of an engine of the same parallelism."
_UNKNOWN_ROWS = "whose rows its result has is not known"


class _Followed:
    """A request, and the one of the other run that it is paired with; without one, ``why_not``.

    Up to position ``done`` it has the same tokens, and all that was to be injected was. In a step its rows
    may be injected up to position ``end``, without that, and ``why_not`` further. ``group`` are the ranks of
    the other run that computed it, and ``before`` the results of stages before this one that these inject.
    """

    def __init__(
        self,
        given: Given,
        other: Request | None,
        why_not: str,
        group: Group = NO_GROUP,
        before: Sequence[str] = (),
    ) -> None:
        self.other = other
        self.group = group
        self.why_not = why_not
        self._before = before
        self.done = self.end = 0
        # The scheduler counts what was generated as the prompt, too, after a preemption.
        self._prompt = given.prompt or 0
        self._names: dict[tuple[str, Path], list[str]] = {}

    def names(self, directory: str, path: Path) -> list[str]:
        """The results of a call in the other run: this rank's, and those of the ranks of its group.

        Empty where this rank has none, or one of them had one that was not stored.
        """
        found = self._names.get((directory, path))
        if found is None and self.other is not None:
            found = self._names[directory, path] = self.group.names(self.other, directory, path)
        return found or []

    def begin_step(self, given: Given) -> None:
        """Find out how many of the rows that come now may be injected."""
        first = int(given.row["first_position"])
        self.end = 0
        if self.other is None:
            return
        if first > self.done:
            self.why_not = "a position before it was not injected, was cached, or was not in a captured step"
            return
        # What comes from there on is computed anew, as after a preemption or in the place of rejected drafts.
        self.end = first
        known = self.other.tokens.known
        for position, token in enumerate(given.tokens, first):
            # Up to there the hash says so.
            if position >= self._prompt and known.get(position) != token:
                self.why_not = (
                    "its tokens are others than in the other run"
                    if position in known
                    else "the other run has no token there, or stored no token ids (log_token_ids)"
                )
                break
            self.end = position + 1
        self._heed_stages_before(self.other, first)

    def _heed_stages_before(self, other: Request, first: int) -> None:
        """Stop where a stage before this one does, which has no other way to say so."""
        for name in self._before:
            for position in range(first, self.end):
                if not other.has_row(name, position):
                    self.stop_at(position, "a pipeline stage before has no result of this position to inject")
                    break

    def end_step(self) -> None:
        """All that was to be injected in the step was, up to ``end``."""
        self.done = self.end

    def give_up(self, why_not: str) -> None:
        """Nothing of it can be injected any more."""
        self.other, self.end, self.why_not = None, 0, why_not

    def stop_at(self, position: int, why_not: str) -> None:
        """From that position on nothing can be injected."""
        if position < self.end:
            self.end, self.why_not = position, why_not


class RowInjection(Injection):
    """The results of single positions of requests, whichever steps and batches computed them.

    A request is paired with one of the other run that has the same prompt. Its rows are injected up to where
    its tokens are others, and only where all before them was: a part of a cache that comes from the model's
    own values would be a second difference. ``rows`` knows whose the rows of a tensor are.

    Raises as `Injection` does, and ConfigError for a run whose ranks are not as many, or share the model
    otherwise: what one of them has may look like what another is to have.
    """

    counted = "rows of results"

    def __init__(self, inject: Inject, run: RunInfo, rows: StepRows) -> None:
        super().__init__(inject)
        if self._run.world_size != run.world_size:
            problem = f"that run is of {self._run.world_size} ranks, and this one of {run.world_size}."
            raise ConfigError("$.inject.run", problem, _OF_THE_SAME)
        if self._run.ranks != places_of(run.document):
            problem = (
                "the ranks of that run share the model in another way (tensor, pipeline, data parallel)."
            )
            raise ConfigError("$.inject.run", problem, _OF_THE_SAME)
        self._groups = groups_of(self._run.ranks, run.rank)
        self._selects = ModuleFilter(inject.modules, "inject.modules")
        # Whether this rank alone may have kept its own, of what other ranks injected.
        self._fell_behind = False
        self._rows = rows
        self._waiting = _by_prompt(self._run)
        self._followed: dict[str, _Followed] = {}
        self._now: dict[str, _Followed] = {}
        self._rows_in_step = 0

    def begin_step(self, number: int) -> None:
        """A step begins, whose rows are not known yet."""
        super().begin_step(number)
        self._now = {}
        self._rows_in_step = 0

    def batch(self, given: Iterable[Given]) -> None:
        """Say what the model is given of which request in the step."""
        for each in given:
            request = str(each.row["request_id"])
            followed = self._followed.get(request)
            if followed is None:
                followed = self._followed[request] = self._paired(each)
            followed.begin_step(each)
            self._now[request] = followed
            self._rows_in_step += int(each.row["rows"])

    def end_step(self) -> Json:
        """What ``step.json`` says of it."""
        for followed in self._now.values():
            followed.end_step()
        found = super().end_step()
        found["injected"]["rows"] = self._injected_in_step
        return found

    def passed_by(self, requests: Iterable[str]) -> None:
        """A step that is not captured computes something of these requests."""
        for request in requests:
            if request in self._followed:
                self._followed[request].give_up("a step of it was not captured")

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended."""
        for request in requests:
            self._followed.pop(request, None)

    def remarks(self) -> list[str]:
        """What is to be said of it at the end."""
        said = super().remarks()
        if self._fell_behind and self._run.world_size > 1:
            said.append(
                "inject: this rank could not read a result that other ranks may have injected: what follows "
                "mixes both models, and tells nothing of either; check that run (tlcore verify), inject again"
            )
        return said

    @property
    def _whole_call(self) -> int:
        return self._rows_in_step or 1

    @property
    def _kept(self) -> str:
        return "rows"

    def _paired(self, given: Given) -> _Followed:
        """A new request with the next one of the other run that has its prompt, preferably its id, too."""
        if not given.apart:
            why_not = "it began without a cache salt of its own, before the capture or around the front end"
            return _Followed(given, None, why_not)
        prompt = given.row.get("prompt_hash")
        if prompt is None:
            return _Followed(given, None, "its prompt is not known")
        waiting = self._waiting.get(str(prompt), [])
        if not waiting:
            return _Followed(given, None, "no request of the other run, or no other one, has its prompt")
        own = given.row.get("external_request_id")
        ids = [self._run.requests[each] for each in waiting]
        try:
            other = self._run.request(waiting.pop(ids.index(own) if own in ids else 0))
            ranks = {rank for _, _, rank in other.outputs}
            group = next((each for each in self._groups if each.same[0] in ranks), self._groups[0])
            return _Followed(given, other, "", group, group.names_before(other, self._selects))
        except ReadError as error:
            self._fell_behind = True
            log.debug("a request of the other run could not be read", exc_info=True)
            why_not = f"its request of the other run could not be read ({type(error).__name__})"
            return _Followed(given, None, why_not)

    def _in_place_of(self, directory: str, own: Any, given: CallArguments) -> Any:
        call = _CallOf(directory, self._now)

        def look(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            found = self._rows.placed(tensor)
            samples = tensor.shape[0] if found.axis else 1
            if found.rows is None or samples != 1 or not self._now:
                raise UnlikeError(_UNKNOWN_ROWS)
            if found.rows.kind in ENCODED:
                raise UnlikeError("an encoder's results are kept for all requests with the same item")
            call.parts[path] = _Part(tensor, found.axis, found.rows.spans)
            return tensor

        with_each_tensor(own, look)
        if not call.parts:
            return own
        try:
            mixed = call.mixed()
        except Exception as error:
            self._fell_behind = True
            for followed in self._now.values():
                followed.stop_at(0, f"a result before could not be read ({type(error).__name__})")
            raise
        injected, left_out = call.counts()
        for why_not, count in left_out.items():
            self._leave_out(why_not, count)
        if injected:
            self._inject(injected)
        for what, rows in call.changed.items():
            overflowed = call.overflowed[what]
            self._convert(what, len(rows - overflowed), len(overflowed))
        return with_each_tensor(own, lambda path, tensor: mixed[id(tensor)])


class _Part(NamedTuple):
    """A tensor of a call's result, and whose the rows are that lie along one of its axes."""

    tensor: torch.Tensor
    axis: int
    spans: Sequence[Span]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(self.rows_in(self.tensor).shape[1:])

    def rows_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of a tensor of this one's shape: its rows in front, without the axis of its sample."""
        return tensor if self.axis == 0 else tensor.movedim(self.axis, 1).squeeze(0)


class _CallOf:
    """One call's result: its ``parts`` are tensors and whose their rows are, by the way to them.

    Of a request all parts are injected up to the same position, or none is; nor is a row that only some ranks
    of its group have, of those that have such a result.
    """

    def __init__(self, directory: str, requests: Mapping[str, _Followed]) -> None:
        self._directory = directory
        self._requests = requests
        self.parts: dict[Path, _Part] = {}
        # The rows of the result that were rounded in any part, or even overflowed, by what to what.
        self.changed: defaultdict[str, set[int]] = defaultdict(set)
        self.overflowed: defaultdict[str, set[int]] = defaultdict(set)
        # Why nothing of a request can be injected in this call, while it can in others.
        self._lacking: dict[str, str] = {}

    def mixed(self) -> dict[int, torch.Tensor]:
        """What stands for each tensor, by its id: the tensor itself where none of its rows is injected."""
        for path, part in self.parts.items():
            for span in part.spans:
                self._limit(path, part, span)
        return {id(part.tensor): self._of(path, part) for path, part in self.parts.items()}

    def counts(self) -> tuple[int, Counter[str]]:
        """How many rows were injected, and how many were not for which reason."""
        injected, left_out = 0, Counter[str]()
        for span in next(iter(self.parts.values())).spans:
            request = str(span.row["request_id"])
            count = self._count(span)
            injected += count
            why_not = self._lacking.get(request)
            if span.row.get("unsampled"):
                why_not = "a chunk of its prompt ended there, and nothing was sampled"
            elif why_not is None:
                why_not = self._requests[request].why_not if request in self._requests else _UNKNOWN_ROWS
            if count < span.length:
                left_out[why_not] += span.length - count
        return injected, left_out

    def _limit(self, path: Path, part: _Part, span: Span) -> None:
        """Stop a request at the first of its positions of which the other run has no such row."""
        request = str(span.row["request_id"])
        followed = self._requests.get(request)
        other = None if followed is None else followed.other
        if followed is None or other is None or span.row.get("unsampled"):
            return
        names = followed.names(self._directory, path)
        if span.first is None:
            self._lacking[request] = _UNKNOWN_ROWS
        elif not names:
            self._lacking[request] = "the other run has no result of this call"
        elif other.row_shape(names[0]) != part.row_shape:
            self._lacking[request] = "the other run's result has another shape"
        elif why_not := unlike(_dtype_of(other, names[0], part.tensor.dtype), part.tensor.dtype):
            self._lacking[request] = why_not
        else:
            for position in range(span.first, min(span.first + span.length, followed.end)):
                if not all(other.has_row(name, position) for name in names):
                    followed.stop_at(position, "the other run has no result of this position")

    def _count(self, span: Span) -> int:
        """How many of the leading rows of a span are injected."""
        request = str(span.row["request_id"])
        followed = self._requests.get(request)
        if followed is None or span.first is None or span.row.get("unsampled") or request in self._lacking:
            return 0
        return max(0, min(span.length, followed.end - span.first))

    def _of(self, path: Path, part: _Part) -> torch.Tensor:
        made = tensor = part.tensor
        for span in part.spans:
            followed, count = self._requests.get(str(span.row["request_id"])), self._count(span)
            if not count or span.first is None or followed is None or followed.other is None:
                continue
            name = followed.names(self._directory, path)[0]
            found = followed.other.rows_at(name, range(span.first, span.first + count))
            made = tensor.clone() if made is tensor else made
            fitted = found.to(device=tensor.device, dtype=tensor.dtype)
            part.rows_in(made)[span.begin : span.begin + count] = fitted
            if found.dtype != tensor.dtype:
                what, became = rounding(found.dtype, tensor.dtype), conversion(found, fitted)
                for rows, flags in zip((self.changed[what], self.overflowed[what]), became, strict=True):
                    rows.update(span.begin + each for each in flags.nonzero().flatten().tolist())
        return made


def _dtype_of(other: Request, name: str, own: torch.dtype) -> torch.dtype:
    return torch_dtype(other.row_dtype(name)) or own


def _by_prompt(run: Run) -> Mapping[str, list[str]]:
    """The requests of a run in the order in which they came, by the hash of their prompts."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for number in run.steps:
        for row in run.step(number).samples:
            if row.get("prompt_hash") is not None:
                found[str(row["prompt_hash"])][str(row["request_id"])] = None
    return {prompt: list(requests) for prompt, requests in found.items()}
