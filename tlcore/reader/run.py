"""A whole run: its steps, its ledger, and what goes over all of its steps."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from ..errors import MissingError, ReadError, VerifyError, missing
from ..layout.directions import PATTERN
from ..layout.names import rank_suffix, shown_numbers
from ..layout.row_scale import is_scaled, restored
from ..layout.run_files import RUN_FILE, RunFiles, remarks_of
from ..ledger import Counts
from ..protocols import StepRanks
from ..record import Json
from ..statistics.channels import ChannelStatistics
from ..statistics.summary import Statistics
from ..storage import Store
from .channels import Channels, channels_of
from .channels import problems_of as channel_problems
from .documents import FOREIGN, check_run, counts_of
from .lookup import without_device
from .over_steps import tensor_over_steps
from .request import Request
from .request_ids import RequestSteps, find_request
from .step import Step
from .stored import Stored
from .unshard import Places, all_committed, places_of
from .verify import gone, unchecked_documents, verify_documents, verify_steps
from .wanted import STORED, Wanted, as_wanted

if TYPE_CHECKING:
    import torch

    from .dataset.dataset import RowDataset
    from .dataset.items import Per

Options = Mapping[str, Any] | None
OpenedAs = tuple[str, Options]

_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]*)/")
_STRUCTURE = re.compile(rf"step_(\d+)/(.+/{PATTERN})(?:_rank_([1-9]\d*))?\.json", re.DOTALL)
_CLOSE_MARKER = re.compile(r"close_rank_([1-9][0-9]*)\.json")
_STEP_FILE = re.compile(r"step_(0|[1-9][0-9]*)/step(?:_rank_([1-9][0-9]*))?\.json")


def run_document(store: Store) -> Json:
    """The checked ``run.json`` of a run. Raises MissingError without one, ReadError for a damaged one."""
    files = RunFiles(store)
    return check_run(files.json(RUN_FILE), f"{files.url}/{RUN_FILE}")


class Run(Mapping[int, Step]):
    """A run: a mapping from its whole steps' numbers to steps.

    A snapshot: what a running capture adds later is seen by opening the run again.
    """

    def __init__(self, store: Store, document: Json, opened_as: OpenedAs | None = None) -> None:
        """``opened_as`` are the path and options by which `open_run` finds it again in another process."""
        self.stored = Stored(store, document)
        self.opened_as = opened_as
        # A step that nobody looks at any more is let go, however many there are.
        self._opened: WeakValueDictionary[int, Step] = WeakValueDictionary()
        self.document = document
        #: The documents without a checksum, of runs that earlier versions wrote; known when `verify` ends.
        self.unchecked: list[str] = []
        # One thread after the other: a listing that was begun earlier must not replace a later one.
        self._refreshing = threading.RLock()

    @property
    def url(self) -> str:
        """The run's directory."""
        return self.stored.url

    @property
    def id(self) -> str:
        """The run's id."""
        return str(self.document["run_id"])

    @property
    def created(self) -> str:
        """When the run was opened, ISO 8601."""
        return str(self.document.get("created", ""))

    @property
    def config(self) -> Json:
        """The configuration that the run was captured with, secrets redacted."""
        return dict(self.document.get("config") or {})

    @property
    def world_size(self) -> int:
        """How many ranks wrote into the run."""
        return int(self.document["world_size"])

    @cached_property
    def ranks(self) -> Places:
        """Each rank's place in vLLM's groups: ``tp_rank``, ``tp_size`` and so on for pp, pcp and dp.

        Empty for a run that does not say; raises ReadError for one that says nonsense.
        """
        return places_of(self.document)

    @property
    def injected(self) -> Json | None:
        """The run, and the modules, whose results stood in for this model's own; None where none did."""
        found = self.document.get("injected")
        return found if isinstance(found, dict) else None

    @property
    def remarks(self) -> list[str]:
        """What is not in the run although it might be expected there, and why, as its capture said."""
        return remarks_of(self.document)

    @property
    def injection(self) -> str | None:
        """In words, whose results stand in for this model's own; None where none do."""
        if self.injected is None:
            return None
        modules = ", ".join(str(each) for each in self.injected.get("modules", ()))
        return f"injected: results of {self.injected.get('run')} stand in for those of {modules}"

    @property
    def is_foreign(self) -> bool:
        """Whether it is a dump of another tool, which has no ledger, hashes or end marks of its own."""
        return self.document.get(FOREIGN) is True

    @cached_property
    def state(self) -> str:
        """``"complete"`` once every rank has closed the run, else ``"incomplete"`` (running or crashed)."""
        closed = all(rank in self._closed for rank in range(1, self.world_size))
        return "complete" if self.document["state"] == "complete" and closed else "incomplete"

    @cached_property
    def _closed(self) -> frozenset[int]:
        """The ranks other than 0 that have left a close marker."""
        if self.is_foreign:
            return frozenset(range(1, self.world_size))
        names = self.stored.files.top if self.world_size > 1 else ()
        return frozenset(int(found[1]) for name in names if (found := _CLOSE_MARKER.fullmatch(name)))

    @property
    def _whole(self) -> dict[int, bool]:
        """Whether each step found is committed by every rank that took part in it, in order."""
        with self._refreshing:
            # What a thread found must not come after what another one saw in the run since.
            return self._whole_now

    @cached_property
    def _whole_now(self) -> dict[int, bool]:
        # Mostly the same ranks have every step.
        known: dict[StepRanks, bool] = {}
        for _, ranks in (steps := self.stored.all_ranks()):
            if ranks not in known:
                known[ranks] = self._is_whole(ranks)
        return {number: known[ranks] for number, ranks in steps}

    def _is_whole(self, ranks: StepRanks) -> bool:
        return all_committed(ranks.committed, ranks.begun, self.world_size, self.ranks)

    @property
    def steps(self) -> list[int]:
        """The steps that every rank has committed, in order; of data-parallel engines, those that had it."""
        return [step for step, whole in self._whole.items() if whole]

    @property
    def incomplete_steps(self) -> list[int]:
        """Steps that some rank has begun but not every rank has committed."""
        return [step for step, whole in self._whole.items() if not whole]

    @cached_property
    def ledger(self) -> Counts:
        """What became of every tensor, over all ranks.

        A rank that has not closed the run (it crashed or is running) counts with its committed steps.
        """
        total = Counts()
        # Only ranks that left something: how many there should be is whatever the run says.
        ranks = {0}.union(self._closed)
        if self.state != "complete":
            ranks |= {rank for each in self.stored.steps.values() for rank in each.committed}
        for rank in sorted(ranks):
            if rank < self.world_size:
                total.add(self.ledger_of(rank))
        return total

    def ledger_of(self, rank: int) -> Counts:
        """What became of every tensor of one rank."""
        if self.is_foreign:
            return self._counted(rank)
        if rank == 0 and self.document["state"] == "complete":
            return counts_of(self.document, f"{self.url}/{RUN_FILE}")
        if rank in self._closed:
            marker = f"close{rank_suffix(rank)}.json"
            return counts_of(self.stored.files.json(marker), f"{self.url}/{marker}")
        known = self.stored.ledger(rank)
        if known is not None:
            return counts_of({"ledger": known}, f"{self.url}: rank {rank}")
        return self._counted(rank)

    def _counted(self, rank: int) -> Counts:
        """The sum of what a rank's steps say."""
        total = Counts()
        for number in self.stored.numbers():
            if rank in self.stored.steps[number].committed:
                total.add(counts_of(self.step(number).documents[rank], f"{self.url}: step {number}"))
        return total

    def step(self, number: int) -> Step:
        """A step, also an incomplete one. Raises MissingError when the run has no such step."""
        step = self._opened.get(number)
        if step is None:
            step = self._opened[number] = self._open(number)
        return step

    def _open(self, number: int) -> Step:
        ranks = self.stored.step_ranks(number) if type(number) is int else None
        if ranks is None:
            raise MissingError(f"{self.url}: no step {number!r}; it has {shown_numbers(self._whole)}")
        return Step(self.stored, number, sorted(ranks.committed), self._is_whole(ranks), self.ranks)

    def tensor(self, name: str, unshard: bool = False, dtype: Wanted = None) -> torch.Tensor:
        """The tensor with a logical name such as ``step_0/layers.0/outputs_cpu``, on the CPU.

        The name may leave out the device, and then means rank 0's tensor, whichever device it was on.
        With ``unshard``, a tensor of which each rank holds a part is joined from all of them. ``dtype`` is
        that in which it is wanted, ``"original"``: the one that it had before ``store_dtype``, or
        ``"stored"``: of rows with a scale (``store_dtype: "int8"``) their bytes.

        A name without the step (``layers.0/outputs_cpu``) means the tensor of every whole step that has it:
        their rows one after the other, as one tensor ``[rows, ...]``; those without dimensions are stacked.
        Raises ReadError where dtype or the other dimensions are not the same in all of them.
        """
        if _STEP_NAME.match(name):
            return self._step_of(name).tensor(name, unshard, dtype)
        if unshard:
            raise ReadError(f"{self.url}: {name!r}: unshard takes the tensor of one step (step_<S>/{name})")
        found, record = tensor_over_steps(self.stored, self, self.steps, name)
        if is_scaled(record) and dtype != STORED:
            found = restored(found, str(record["converted_from"]))
        return as_wanted(found, record, dtype)

    def _step_of(self, name: str) -> Step:
        begin = _STEP_NAME.match(name)
        if begin is None:
            raise MissingError(f"{self.url}: {name!r} is not a logical name (step_<S>/<module>/<stem>)")
        return self.step(int(begin[1]))

    def stats(self, name: str) -> Statistics:
        """The statistics that were captured of the tensor with a logical name, with or without the device.

        Raises MissingError for a tensor that has none.
        """
        plain = name.removesuffix(".pt")
        known = self._step_of(plain).stats
        meant = [plain] if plain in known else without_device(known).get(plain, ())
        if not known:
            raise MissingError(
                f'{self.url}: no statistics of {plain!r}; they take "capture": "stats" or "both"'
            )
        if len(meant) != 1:
            raise missing("statistics of", plain, self.url, meant or known)
        return known[meant[0]]

    @cached_property
    def _channels(self) -> Channels:
        return Channels(self.stored.files, 0 if self.is_foreign else self.world_size)

    @property
    def channel_files(self) -> Mapping[str, bytes]:
        """The files that the statistics for each channel lie in, by name. Raises ReadError for damage."""
        return self._channels.files

    @property
    def channel_names(self) -> list[str]:
        """The names that `channels` has statistics for, of every rank, with their devices."""
        return list(self._channels)

    def has_channels(self, name: str) -> bool:
        """Whether there are statistics for each channel of what ``name`` means to `channels`."""
        return name in self._channels or bool(self._channels.holders(name))

    def channels(self, name: str) -> ChannelStatistics:
        """Statistics for each channel of a tensor over all steps, captured with ``"capture": "channels"``.

        ``name`` is a logical name without its step, such as ``model.layers.5/outputs_0_cpu``. Without the
        device it means that tensor of all ranks: of data-parallel ones, or those of a group, all rows. Those
        of several runs are merged by `tlcore.merge_channels`. Raises MissingError, or ReadError where
        each rank has a part of the tensor only.
        """
        return channels_of(self, self._channels, name)

    @cached_property
    def requests(self) -> Mapping[str, str | None]:
        """vLLM's id of each request in the run, with the client's own where it is known for certain."""
        return self._request_steps.ids

    @cached_property
    def _request_steps(self) -> RequestSteps:
        from .dataset.wanted import steps_of

        return RequestSteps(steps_of(self, self.steps, ()))

    def request(self, request_id: str, sample: int | None = None) -> Request:
        """A request's tensors over all steps, its rows in the order of their positions.

        ``request_id`` is vLLM's full id, the one given to `LLM.generate`, or the one sent to the server;
        ``sample`` tells the samples of a request with ``n`` > 1 apart. Raises MissingError when there is
        no such request, ReadError when there are several.
        """
        full = find_request(self._request_steps, request_id, sample, self.url)
        steps = [self.step(number) for number in self._request_steps.of(full)]
        return Request(self.url, full, self.requests[full], steps)

    def dataset(
        self,
        names: str | Sequence[str],
        rows: str | Mapping[str, Any] = "all",
        context: int | None = None,
        per: Per = "token",
    ) -> RowDataset:
        """The rows of requests (or samples) as a data set of torch, one item a token.

        ``names`` are names without their step, such as ``model.layers.5/outputs_0``, with or without the
        device; only positions that all of these tensors have are in it. ``rows`` is a window as in the
        configuration: ``"all"``, ``"prompt"``, ``"response"``, ``{"from": a, "to": b}``. With ``context`` an
        item is that many positions which follow one another, with ``per="request"`` a whole request; one with
        gaps is left out, never padded. Raises MissingError for a name without rows, ReadError.
        """
        from .dataset.dataset import make_dataset

        return make_dataset(self, names, rows, context, per)

    def json(self, name: str) -> Any:
        """The value of one of the run's JSON documents, such as ``step_0/layers.0/outputs.json``.

        They have these names whatever the backend. Raises MissingError or ReadError.
        """
        if found := _STRUCTURE.fullmatch(name):
            return self.stored.structure(int(found[1]), int(found[3] or 0), f"{found[2]}.json")
        if found := _STEP_FILE.fullmatch(name):
            return self.stored.document(int(found[1]), int(found[2] or 0))
        return self.stored.files.json(name)

    def refresh(self) -> None:
        """See what was committed since the run was opened; steps that are held stay as they are."""
        with self._refreshing:
            if not self.is_foreign:
                self.document = run_document(self.stored.store)
            self.stored.refresh()
            self._opened.clear()
            for name in (
                "state",
                "ledger",
                "requests",
                "_request_steps",
                "_closed",
                "_whole_now",
                "_channels",
            ):
                self.__dict__.pop(name, None)

    def verify(self, on_tensor: Callable[[], None] | None = None) -> int:
        """Check every committed tensor and structure; returns how many tensors are sound.

        It answers for what is stored: what was lost at capture stands in `ledger`. ``on_tensor`` is called
        after each tensor; `unchecked` is told then. Raises VerifyError naming what is damaged or missing.
        """
        markers = [f"close{rank_suffix(rank)}.json" for rank in sorted(self._closed)]
        own = ([], []) if self.is_foreign else verify_documents(self.stored.files, [RUN_FILE, *markers])
        checked, bad = verify_steps(self.stored, on_tensor)
        bad = own[0] + bad
        self.unchecked = own[1] + unchecked_documents(self.stored)
        bad += channel_problems(self._channels)
        try:
            if self.state == "complete" and not (bad or self.is_foreign):
                bad += gone(self.stored, checked, self.ledger)
        except ReadError as error:
            # A damaged step.json, which the ledger of an unfinished run is made from, is among them already.
            bad += [] if str(error) in bad else [str(error)]
        if bad:
            raise VerifyError(bad)
        return checked

    def __getitem__(self, number: int) -> Step:
        step = self.step(number)
        if not step.complete:
            raise MissingError(f"{self.url}: step {number} is incomplete; run.step({number}) opens it")
        return step

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<Run {self.url} {self.state}, {len(self.steps)} steps>"
