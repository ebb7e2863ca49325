"""A capture session: one run, one sink, and the steps of the models attached to it."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..config.configuration import Config
from ..errors import CaptureError
from ..layout.drafts import Decided
from ..layout.dtypes import torch_dtype
from ..layout.run_files import REMARKS
from ..layout.structure import class_name
from ..ledger import Counts
from ..protocols import Sink
from ..record import Json, RunInfo
from ..storage import SupportsWaiting
from .batch import StepEnd
from .filters.choosing import Choice, Choosing
from .filters.requests import request_filter
from .filters.rows import StepRows
from .filters.run_bytes import RunBytes
from .filters.samples import Samples
from .filters.tensors import TensorFilter, known_devices
from .hooks.batch_calls import BatchCalls
from .hooks.collector import Collector
from .hooks.gradients import Gradients
from .hooks.listening import ModulesOf, Source
from .hooks.module_tree import ModuleTree
from .hooks.steps import StepCalls
from .hooks.tracing import PassedBy
from .hookup import Hookup
from .injected import injected
from .new_run import open_run
from .pipeline.channels import gather_channels
from .pipeline.executors import InlineExecutor, ThreadExecutor
from .pipeline.inspector import Inspection
from .pipeline.processor import Processor
from .remarks import NO_GRADIENTS, NO_TENSORS
from .run_documents import close_run
from .staging.host_memory import HostPool
from .staging.stager import Stager

log = logging.getLogger("tlcore")


class Session:
    """Captures the selected steps of one model into one run.

    ``rows`` is to be told which rows a step's tensors have, where that is known; without it nothing is stored
    where the configuration asks for a choice. Opening the sink comes first: BackendError says that the place
    cannot be written before any hook exists. ``inline`` stores in the model's thread, for debugging. In
    batches ``of_requests`` another run's results are injected row by row; ``row_injection`` is told of each.
    """

    def __init__(
        self,
        config: Config,
        run: RunInfo,
        sink: Sink | None = None,
        inline: bool = False,
        of_requests: bool = False,
    ) -> None:
        devices = known_devices(config.device_names)
        self.config = config
        self.rows = StepRows(request_filter(config), config.last_only, config.window)
        run, injection, self.row_injection = injected(config, run, self.rows, of_requests)
        self._pool = HostPool(config.queue_bytes, config.on_full)
        self._documents, self._sink = open_run(config, replace(run, hold=self._pool.hold), sink)
        self.run = run = self._documents.run
        self._inline, self._pid = inline, os.getpid()
        self._pipeline: InlineExecutor | ThreadExecutor | None = None
        self._processor: Processor | None = None
        self._next_step = self._started = 0
        self._step: int | None = None
        self.captured_steps = 0
        # What is said at the end, of that which is not in the run.
        self.remarks: list[str] = []
        self._closed, self._lock = False, threading.RLock()
        self._stager = Stager(self._pool, config.block_s)
        self._examination = Inspection.of(config)
        self._channels, self._selects_all = config.capture == "channels", config.selects_all
        self._room = RunBytes.of(config.max_run_bytes, later=self._examination.needed or self._channels)
        stored_as = torch_dtype(config.store_dtype)
        tensors = TensorFilter(devices, config.max_tensor_size, self._room, self._channels, stored_as)
        self.samples = Samples(config.keeps_token_ids, config.window.needs_prompt)
        self.rows.prompts = self.samples.tokens.prompts
        self._collector = self._make_collector(tensors)
        self._hookup = Hookup(config, self._collector, run.world_size == 1, injection)
        self._collector.before_hand_over = self.rows.note
        self.rows.calls_begun, self.rows.counts = self._collector.calls_begun, self._hookup.counts
        atexit.register(self.close)
        _live.add(self)

    @property
    def url(self) -> str:
        """The run's directory, a path or URL that `tlcore.open_run` takes."""
        return self.run.url

    @property
    def run_id(self) -> str:
        """The run's UUIDv7."""
        return self.run.run_id

    @property
    def step(self) -> int | None:
        """The step that is being captured; None between steps."""
        return self._step

    @property
    def ledger(self) -> Counts:
        """What became of every captured tensor, up to the last step that was committed or failed."""
        return self.run.ledger.snapshot()

    @property
    def waiting(self) -> str | None:
        """What a ``spill_dir``, or a sink that waits, has not delivered to its place yet, in words."""
        waiting = self._sink.waiting if isinstance(self._sink, SupportsWaiting) else None
        return waiting or self._documents.waiting

    @property
    def passed_by(self) -> PassedBy:
        """Which calls were only traced, and by what."""
        return self._collector.passed_by

    @property
    def failing(self) -> BaseException | None:
        """Why the last step could not be stored; None once one is stored again."""
        return self._processor.failing if self._processor is not None else None

    @property
    def queue_bytes(self) -> int:
        """Bytes of memory that hold captured tensors which are not stored yet."""
        return self._pool.in_flight

    @property
    def blocked_s(self) -> float:
        """Seconds for which the model has waited for room in the queue."""
        return self._pool.waited

    def _make_collector(self, tensors: TensorFilter) -> Collector:
        objects = frozenset(self.config.capture_objects)
        rows = self.rows if self.config.cuts_rows else None
        narrows = "modules" in self.config.request_overrides
        made = Collector(self._stager, tensors, self.config.capture, objects, rows, narrows)
        if self.config.log_gradients:
            made.gradients = Gradients(made)
        return made

    def attach(
        self,
        model: nn.Module,
        source: Source | None = None,
        modules_of: ModulesOf | None = None,
        may_change_within: bool = False,
        traced: StepCalls | None = None,
        follow: Callable[[ModuleTree], object] | None = None,
    ) -> None:
        """Plan the hooks for a model and its submodules.

        ``source`` captures its modules by itself. ``modules_of`` gives a model's submodules by the names
        that they are to go by, where these are not those of ``named_modules``. Where the model
        ``may_change_within`` a step, what it becomes there is heard, too. With ``traced`` listeners stay
        until the end, and compilers trace along what shows calls to them; it is told which calls are steps.
        ``follow`` is told of the model's modules in each captured step that finds others than before.

        Raises CaptureError for a compiled model, or when another model is attached already.
        """
        if self._pipeline is not None:
            raise CaptureError("this session has a model already; open another session for a second model")
        self._hookup.attach(model, source, modules_of, may_change_within, traced, follow)
        for device in {parameter.device for parameter in model.parameters()}:
            self._stager.reserve(device)
        self._processor = Processor(
            self._sink, self._pool, self.run.ledger, self.run.rank, self._examination, self._documents.close,
            gather_channels(self.run) if self._channels else None, self._room,
        )  # fmt: skip
        self._pipeline = (
            InlineExecutor(self._processor) if self._inline else ThreadExecutor(self._processor, self._pool)
        )
        self._collector.submit = self._pipeline.submit

    @property
    def tree(self) -> ModuleTree | None:
        """The modules of the attached model, as they were at the last look; None without one."""
        hooks = self._hookup.hooks
        return hooks.tree if hooks is not None else None

    @property
    def modules(self) -> list[str]:
        """The modules that are listened to; none where more may be captured than these."""
        return [] if self.config.ops else self._hookup.modules

    def listen_to_batches(self) -> BatchCalls:
        """Let `samples` tell whose the rows of a step's tensors are, from what the model is given."""
        return self._hookup.listen_to_batches(self.rows, self.samples)

    def attach_draft(self, model: nn.Module) -> None:
        """Also listen to the modules of a model that proposes what the attached one verifies, in its `turn`.

        It goes by ``draft``, they by their names behind that, those, too, that both models share.
        """
        self._hookup.attach_draft(model)

    def turn(self, draft: bool) -> None:
        """Within a step: listen to the draft model's calls from now on, or again to the attached model's."""
        if self._step is not None:
            self._hookup.turn(draft)

    def choosing(self, requests: Collection[str], choices: Mapping[str, Choice]) -> Choosing:
        """Which rows of the next step's ``requests`` are kept, of which some choose for themselves."""
        return self.rows.usual.of_step(requests, choices, self.config.selects_step(self._next_step))

    def begin_step(
        self,
        step: int | None = None,
        wanted: bool = True,
        more_than_a_call: bool = False,
        choosing: Choosing | None = None,
    ) -> bool:
        """Start a step (the next number when None); True when it is captured, its hooks alive now.

        A step that is not ``wanted`` is only counted. In one that is ``more_than_a_call`` of the model,
        others may replace what stands for a ``forward``. ``choosing`` is what `choosing` said of it, where
        requests may choose for themselves.
        """
        with self._lock:
            if self._closed or self._hookup.hooks is None:
                return False
            if self._step is not None:
                self.end_step(extra={"error": "the step was cut short"})
            number = self._next_step if step is None else step
            if number < self._next_step:
                raise CaptureError(f"step {number} has been; the next one is {self._next_step} or later")
            self._next_step = number + 1
            asked = choosing is not None and choosing.asked
            if not (wanted and (self._selects_all or self.config.selects_step(number) or asked)):
                self._hookup.rest()
                return False
            self._step = number
            self._started = time.time_ns()
            cuts = choosing is not None and choosing.cuts
            self._collector.begin_step(number, self.rows if cuts else None)
            self.rows.begin_step(choosing)
            self._hookup.install(number, more_than_a_call, self.samples)
            return True

    def end_step(
        self,
        rows: Sequence[Json] | None = None,
        extra: Mapping[str, Any] | None = None,
        error: BaseException | None = None,
        decided: Callable[[], Mapping[str, Decided]] | None = None,
        tokens: Callable[[], list[Json]] | None = None,
    ) -> None:
        """End the step that `begin_step` started and hand it over to be committed.

        ``rows`` are those of the step where ``self.rows`` was not told of them. ``error`` is what ended
        the step early, if anything: what was captured until then is kept. ``decided`` says, asked in the
        pipeline's thread, what became of which request's draft tokens, and ``tokens`` the ids of the step's
        (`tlcore.layout.tokens`).
        """
        with self._lock:
            if self._closed or self._step is None or self._pipeline is None:
                return
            number, self._step = self._step, None
            self.captured_steps += 1
            details = {**self._hookup.told(), **(extra or {})}
            self._hookup.remove()
            if error is not None:
                details["error"] = class_name(error)
            ended = time.time_ns()
            self.rows.resume_main()
            problem = self._hookup.end_source()
            if problem is not None:
                details.setdefault("error", problem)
            told, samples = self.rows.document(), self.samples
            if samples.asked:
                told |= samples.document(self.rows.chooses)
                if tokens is None and (own := samples.tokens.document(self.rows.chooses)):
                    tokens = functools.partial(list, own)
            unopened = self._collector.end_step()
            rows = told.pop("rows", rows)
            extra = {**told, **details}
            late = decided, unopened, tokens, self.rows.undecided
            self._pipeline.submit(StepEnd(number, self._started, ended, rows, extra, *late))
            if not (self._selects_all or self.config.selects_any_after(number)):
                self._settle(number)

    def _settle(self, step: int) -> None:
        """After a step nothing more comes that could be stored together with it, unless requests ask."""
        if self._pipeline is not None and self.config.selects_step(step):
            self._pipeline.settle()
        if not self.config.requests_ask:
            self._give_memory_back()

    def _close_hooks(self) -> None:
        self.remarks += self._hookup.close(bool(self.captured_steps))

    def _give_memory_back(self) -> None:
        # Before Python finds out that nobody needs the session any more.
        self._pool.retire()
        self._stager.leave()

    def step_aside(self) -> None:
        """Take the hooks away until the next selected step; for whoever compiles between two steps."""
        with self._lock:
            if self._step is None:
                self._hookup.remove()

    def flush(self) -> None:
        """Wait until every step that has ended is stored or booked as failed."""
        if self._pipeline is not None and not self._closed:
            self._pipeline.flush()

    def flush_soon(self) -> threading.Event:
        """Have every step that has ended stored soon; the event is set when they are, or booked as failed."""
        if self._pipeline is None or self._closed:
            done = threading.Event()
            done.set()
            return done
        return self._pipeline.settle()

    def _end_last_step(self) -> None:
        try:
            self.end_step(extra={"error": "the session was closed in the step"})
        except Exception:
            # What was captured before it still has to be stored.
            log.warning("run %s: its last step is lost", self.run.shown_url, exc_info=True)

    def detach(self) -> None:
        """Stop capturing and take the hooks away; what is queued is stored by `close`. Safe to repeat."""
        with self._lock:
            self._end_last_step()
            self._close_hooks()

    def close(self) -> None:
        """End the run: finish what is queued, write ``run.json``, log the ledger. Safe to repeat.

        Raises CaptureError when something could not be stored and ``on_error`` is ``"raise"``.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._end_last_step()
            self._closed = True
            self._give_memory_back()
        atexit.unregister(self.close)
        self._close_hooks()
        gradients = self._collector.gradients
        if self.captured_steps and gradients is not None and not gradients.awaited:
            self.remarks.append(NO_GRADIENTS)
        if self.remarks:
            self.run.document[REMARKS] = list(self.remarks)
        if self._pipeline is not None:
            self._pipeline.close()
        else:
            close_run(self._sink, self._documents)
        counts = self.ledger
        log.info(
            "run %s: captured %d = stored %d + skipped %d + dropped %d + failed %d %s%s",
            self.run.shown_url, counts.captured, counts.stored, counts.skipped, counts.dropped, counts.failed,
            dict(sorted(counts.reasons.items())) or "",
            f" (wider floats as {self.config.store_dtype})" if self.config.store_dtype else "",
        )  # fmt: skip
        if self.captured_steps and not counts.captured:
            self.remarks.append(NO_TENSORS.format(self.captured_steps))
        if self.remarks:
            log.warning("run %s: %s", self.run.shown_url, "\n  ".join(self.remarks))
        first = self._processor.first_error if self._processor else None
        if first is not None and self.config.on_error == "raise":
            lost = f"{counts.failed} tensors could not be stored" if counts.failed else "closing failed"
            raise CaptureError(f"{lost}: {first}") from first

    def abandon(self) -> None:
        """Stop capturing without storing anything: what a forked child does with its parent's session.

        The pipeline's thread does not exist there, and the run belongs to the parent.
        """
        self._closed = True
        self._hookup.remove()
        self._hookup.rest()


_live: weakref.WeakSet[Session] = weakref.WeakSet()


def _abandon_all() -> None:
    for session in list(_live):
        session.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
