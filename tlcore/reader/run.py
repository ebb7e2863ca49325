"""A whole run: opening it, listing the runs of a directory, its steps, its ledger."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..errors import ReadError, VerifyError
from ..layout.names import rank_of, rank_suffix, redact_url, step_dir
from ..record import Counts, Json
from ..statistics.summary import Statistics
from .documents import LARGEST_JSON, check_run
from .files import RUN_FILE, MissingError, RunFiles, local_directory, missing, store_at
from .lookup import without_device
from .request import Request, find_request, known_requests
from .step import Step, counts_of
from .unshard import Places, all_committed, places_of
from .verify import verify_step

Options = Mapping[str, Any] | None

_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]*)/")
_CLOSE_MARKER = re.compile(r"close_rank_([1-9][0-9]*)\.json")
_STEP_FILE = re.compile(r"step_(0|[1-9][0-9]*)/step(?:_rank_([1-9][0-9]*))?\.json")


def open_run(path: str | os.PathLike[str], storage_options: Options = None) -> Run:
    """The run whose directory (a path or any fsspec URL) is ``path``; only its ``run.json`` is read now.

    ``storage_options`` go to the URL's fsspec filesystem. Raises ReadError when there is nothing,
    something else, several runs, or a newer layout; BackendError when the URL cannot be opened.
    """
    files = RunFiles(store_at(path, storage_options))
    try:
        return _run_of(files)
    except MissingError:
        raise _not_one_run(path, storage_options) from None


def is_run(path: str | os.PathLike[str], storage_options: Options = None) -> bool:
    """Whether a path or URL has a ``run.json``. Raises as `open_run` does when it cannot be looked at."""
    files = RunFiles(store_at(path, storage_options))
    try:
        files.read(RUN_FILE, 0, LARGEST_JSON + 1)
    except MissingError:
        return False
    return True


def _run_of(files: RunFiles) -> Run:
    return Run(files, check_run(files.json(RUN_FILE), f"{files.url}/{RUN_FILE}"))


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run of an ``output_dir``; ``problem`` says why it cannot be read, where it cannot.

    ``dropped`` and ``failed`` of the ``captured`` tensors were lost at capture and are not in the run.
    """

    run_id: str
    path: str
    state: str
    created: str
    steps: int
    tensors: int
    bytes: int
    problem: str | None = None
    captured: int = 0
    dropped: int = 0
    failed: int = 0


def list_runs(output_dir: str | os.PathLike[str], storage_options: Options = None) -> list[RunSummary]:
    """The runs in a directory or at a URL, the newest last; damaged ones are listed with their problem.

    Raises ReadError when there is no such directory, BackendError when the URL cannot be opened.
    """
    directory = local_directory(output_dir)
    if directory is not None:
        children = sorted(child for child in directory.iterdir() if (child / RUN_FILE).is_file())
        runs = [_summary(str(child), RunFiles(store_at(child))) for child in children]
    else:
        runs = _runs_in(RunFiles(store_at(output_dir, storage_options)))
    return sorted(runs, key=lambda run: (run.created, run.run_id))


def _runs_in(files: RunFiles) -> list[RunSummary]:
    """The runs directly below a remote directory."""
    names = sorted(name.partition("/")[0] for name in files.sizes if re.fullmatch(r"[^/]+/run\.json", name))
    return [_summary(f"{files.url}/{name}", RunFiles(files.store, f"{name}/")) for name in names]


def _summary(path: str, files: RunFiles) -> RunSummary:
    try:
        run = _run_of(files)
        counts, steps = run.ledger, len(run.steps)
    except ReadError as error:
        return RunSummary(path.rpartition("/")[2], path, "unreadable", "", 0, 0, 0, str(error))
    return RunSummary(
        run.id,
        path,
        run.state,
        run.created,
        steps,
        counts.stored,
        counts.bytes_stored,
        captured=counts.captured,
        dropped=counts.dropped,
        failed=counts.failed,
    )


def _not_one_run(path: str | os.PathLike[str], storage_options: Options) -> ReadError:
    runs = list_runs(path, storage_options)
    where = redact_url(os.fspath(path))
    if not runs:
        return ReadError(f"{where}: not a run (it has no {RUN_FILE}), and no run lies directly in it")
    shown = "\n".join(f"  {run.path}  {run.state}  {run.created}" for run in reversed(runs[-20:]))
    more = f"\n  ... and {len(runs) - 20} older ones" if len(runs) > 20 else ""
    held = f"{where}: holds runs ({len(runs)}) and is none itself"
    return ReadError(f"{held}; the newest is {runs[-1].path}\n{shown}{more}")


class Run(Mapping[int, Step]):
    """A run: a mapping from its whole steps' numbers to steps.

    A snapshot: what a running capture adds later is seen by opening the run again.
    """

    def __init__(self, files: RunFiles, document: Json) -> None:
        self.files = files
        # A step that nobody looks at any more is let go, however many there are.
        self._opened: WeakValueDictionary[int, Step] = WeakValueDictionary()
        self.document = document

    @property
    def url(self) -> str:
        """The run's directory."""
        return self.files.url

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

    @cached_property
    def state(self) -> str:
        """``"complete"`` once every rank has closed the run, else ``"incomplete"`` (running or crashed)."""
        closed = all(self._close_marker(rank) in self.files.sizes for rank in range(1, self.world_size))
        return "complete" if self.document["state"] == "complete" and closed else "incomplete"

    @cached_property
    def _committed(self) -> dict[int, set[int]]:
        """Each step found, with the ranks that have committed it."""
        return _committed_in(self.files.sizes)

    @cached_property
    def _whole(self) -> dict[int, bool]:
        """Whether each step found is committed by every rank that took part in it."""
        return {
            number: self._is_whole(number, ranks, self._begun) for number, ranks in self._committed.items()
        }

    @cached_property
    def _begun(self) -> Mapping[int, set[int]]:
        """The ranks that have left a file in each step, where not all have the same steps."""
        return self._begun_in(self.files.sizes)

    def _is_whole(self, number: int, committed: set[int], begun: Mapping[int, set[int]]) -> bool:
        return all_committed(committed, begun.get(number, set()), self.world_size, self.ranks)

    def _begun_in(self, names: Iterable[str]) -> dict[int, set[int]]:
        found: dict[int, set[int]] = defaultdict(set)
        if any(place["dp_size"] > 1 for place in self.ranks.values()):
            for name in names:
                if begin := _STEP_NAME.match(name):
                    found[int(begin[1])].add(rank_of(name))
        return found

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
        closed = {int(found[1]) for name in self.files.sizes if (found := _CLOSE_MARKER.fullmatch(name))}
        for rank in sorted({0}.union(closed, *self._committed.values())):
            if rank < self.world_size:
                total.add(self._ledger_of(rank))
        return total

    def _ledger_of(self, rank: int) -> Counts:
        if rank == 0 and self.document["state"] == "complete":
            return counts_of(self.document, f"{self.url}/{RUN_FILE}")
        marker = self._close_marker(rank)
        if rank > 0 and marker in self.files.sizes:
            return counts_of(self.files.json(marker), f"{self.url}/{marker}")
        total = Counts()
        for number, ranks in self._committed.items():
            if rank in ranks:
                total.add(counts_of(self.step(number).documents[rank], f"{self.url}: step {number}"))
        return total

    def step(self, number: int) -> Step:
        """A step, also an incomplete one. Raises MissingError when the run has no such step."""
        step = self._opened.get(number)
        if step is None:
            step = self._opened[number] = self._open(number)
        return step

    def _open(self, number: int) -> Step:
        committed, begun = self._found(number)
        ranks = committed.get(number)
        if ranks is None:
            held = ", ".join(map(str, self._committed)) or "none"
            raise MissingError(f"{self.url}: no step {number!r}; it has {held}")
        whole = self._is_whole(number, ranks, begun)
        return Step(self.files, number, sorted(ranks), whole, self.ranks)

    def _found(self, number: int) -> tuple[Mapping[int, set[int]], Mapping[int, set[int]]]:
        """The ranks that have committed, and begun, at least the step ``number``."""
        if "_committed" in self.__dict__ or type(number) is not int or number < 0:
            return self._committed, self._begun
        # Looking at this step alone is enough.
        names = self.files.sizes_in(step_dir(number))
        return _committed_in(names), self._begun_in(names)

    def tensor(self, name: str, unshard: bool = False) -> torch.Tensor:
        """The tensor with a logical name such as ``step_0/layers.0/outputs_cpu``, on the CPU.

        The name may leave out the device, and then means rank 0's tensor, whichever device it was on.
        With ``unshard``, a tensor of which each rank holds a part is joined from all of them.
        """
        return self._step_of(name).tensor(name, unshard)

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
        if len(meant) != 1:
            raise missing("statistics of", plain, self.url, meant or known)
        return known[meant[0]]

    @cached_property
    def requests(self) -> Mapping[str, str | None]:
        """vLLM's id of each request in the run, with the client's own where it is known for certain."""
        return known_requests(self.step(number) for number in self.steps)

    def request(self, request_id: str, sample: int | None = None) -> Request:
        """A request's tensors over all steps, its rows in the order of their positions.

        ``request_id`` is vLLM's full id, the one given to `LLM.generate`, or the one sent to the server;
        ``sample`` tells the samples of a request with ``n`` > 1 apart. Raises MissingError when there is
        no such request, ReadError when there are several.
        """
        full = find_request(self.requests, request_id, sample, self.url)
        steps = [self.step(number) for number in self.steps]
        return Request(self.url, full, self.requests[full], steps)

    def json(self, name: str) -> Any:
        """The value of one of the run's JSON files, such as ``step_0/layers.0/outputs.json``."""
        return self.files.json(name)

    def verify(self, on_tensor: Callable[[], None] = lambda: None) -> int:
        """Check every committed tensor and structure; returns how many tensors are sound.

        It answers for what is stored: what was lost at capture stands in `ledger`.
        ``on_tensor`` is called after each tensor. Raises VerifyError naming each damaged or missing file.
        """
        bad: list[str] = []
        checked = 0
        for number, ranks in self._committed.items():
            for rank in sorted(ranks):
                count, problems = verify_step(self.files, step_dir(number), rank, on_tensor)
                checked += count
                bad += problems
        try:
            _ = self.ledger
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

    @staticmethod
    def _close_marker(rank: int) -> str:
        return f"close{rank_suffix(rank)}.json"


def _committed_in(names: Iterable[str]) -> dict[int, set[int]]:
    """Each step that has a file, with the ranks whose ``step.json`` is there."""
    found: dict[int, set[int]] = {}
    for name in names:
        if begin := _STEP_NAME.match(name):
            ranks = found.setdefault(int(begin[1]), set())
            if marker := _STEP_FILE.fullmatch(name):
                ranks.add(int(marker[2] or 0))
    return dict(sorted(found.items()))
