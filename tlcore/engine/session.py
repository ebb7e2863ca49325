"""A capture session: one run, one sink, and the steps of the models attached to it."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..config.configuration import Config
from ..errors import CaptureError
from ..layout.rows import Decided
from ..layout.structure import class_name
from ..ledger import Counts
from ..protocols import Sink
from ..record import Json, RunInfo
from ..storage import SupportsWaiting
from . import remarks
from .audience import Audience, as_draft, call_directory, renaming
from .batch import Batch, StepEnd
from .filters.requests import request_filter
from .filters.rows import StepRows
from .filters.samples import Samples
from .filters.tensors import TensorFilter, known_devices
from .hooks.batch_calls import BatchCalls
from .hooks.collector import Collector
from .hooks.compiled_parts import refuse_compiled
from .hooks.gradients import Gradients
from .hooks.listeners import ListenerSet
from .hooks.listening import Source
from .hooks.module_tree import ModuleTree
from .hooks.steps import StepCalls
from .hooks.tap_sites import Taps
from .hooks.traced import TracedListeners
from .hooks.tracing import PassedBy
from .new_run import now, open_run
from .pipeline.executors import InlineExecutor, ThreadExecutor
from .pipeline.inspector import Inspection
from .pipeline.processor import Processor
from .run_documents import close_run
from .staging.host_memory import HostPool
from .staging.stager import Stager

log = logging.getLogger("tlcore")


class Session:
    """Captures the selected steps of one model into one run.

    ``rows`` is to be told which rows a step's tensors have, where that is known; without it nothing is stored
    where the configuration asks for a choice.
    Opening the sink is the first thing that happens: BackendError says that the place cannot be
    written before any hook exists. ``inline`` stores in the model's thread, for debugging.
    """

    def __init__(self, config: Config, run: RunInfo, sink: Sink | None = None, inline: bool = False) -> None:
        devices = known_devices(config.device_names)
        self.config = config
        self._pool = HostPool(config.queue_bytes, config.on_full)
        self._documents, self._sink = open_run(config, replace(run, hold=self._pool.hold), sink)
        self.run = run = self._documents.run
        self._inline = inline
        self._pid = os.getpid()
        self._hooks: ListenerSet | None = None
        self._draft: ListenerSet | None = None
        self._source: Source | None = None
        self._batches: BatchCalls | None = None
        self._pipeline: InlineExecutor | ThreadExecutor | None = None
        self._processor: Processor | None = None
        self._next_step = 0
        self._step: int | None = None
        self._started = ""
        self.captured_steps = 0
        self._said_elsewhere = False
        # What is said at the end, of that which is not in the run.
        self.remarks: list[str] = []
        # Taps in code that may be compiled, where it is known of them before.
        self.code_taps: Sequence[str] = ()
        self._closed = False
        self._lock = threading.RLock()
        self._stager = Stager(self._pool, config.block_s)
        self._examination = Inspection.of(config)
        # Where tensors are looked at first, only then is it known which are stored.
        at_once = None if self._examination.needed else config.max_run_bytes
        tensors = TensorFilter(devices, config.max_tensor_size, at_once)
        self.rows = StepRows(request_filter(config), config.last_only, config.window)
        self.samples = Samples(config.keeps_token_ids, config.window.needs_prompt)
        self.rows.prompts = self.samples.tokens.prompts
        self._collector = self._make_collector(tensors)
        self._audience = Audience(config, self._collector)
        self._taps = Taps(self._collector, self._audience.selector, call_directory)
        self._collector.before_hand_over = self.rows.note
        self.rows.calls_begun = self._collector.calls_begun
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
        made = Collector(self._stager, tensors, self._submit, self.config.capture, objects, rows)
        if self.config.log_gradients:
            made.gradients = Gradients(made)
        return made

    def attach(
        self,
        model: nn.Module,
        source: Source | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        may_change_within: bool = False,
        traced: StepCalls | None = None,
    ) -> None:
        """Plan the hooks for a model and its submodules.

        ``source`` captures its modules by itself. ``modules`` are the submodules by the names that they
        are to go by, where these are not those of ``named_modules``. Where the model ``may_change_within`` a
        step, what it becomes there is heard, too. With ``traced`` listeners stay until the end, and compilers
        trace along what shows calls to them; it is told which calls are steps.

        Raises CaptureError for a compiled model, or when another model is attached already.
        """
        if self._pipeline is not None:
            raise CaptureError("this session has a model already; open another session for a second model")
        refuse_compiled(model)
        self._source = source
        self._audience.source = source
        rename = None if modules is None else renaming(modules)
        if traced is not None:
            select = functools.partial(self._audience.traced_listener, traced)
            self._hooks = TracedListeners(model, select, rename)
        else:
            listener, counts = self._audience.listener, self._audience.counts
            self._hooks = ListenerSet(model, listener, rename, may_change_within, counts)
        self._taps.add(self._hooks)
        self._audience.listen_within(self._hooks)
        if self._has_all_modules:
            self._audience.say_what_nobody_is_called(self._hooks, class_name(model))
        for device in {parameter.device for parameter in model.parameters()}:
            self._stager.reserve(device)
        self._processor = Processor(
            self._sink, self._pool, self.run.ledger, self.run.rank, self._examination, self._documents.close
        )
        self._pipeline = (InlineExecutor if self._inline else ThreadExecutor)(self._processor)

    @property
    def tree(self) -> ModuleTree | None:
        """The modules of the attached model, as they were at the last look; None without one."""
        return self._hooks.tree if self._hooks is not None else None

    def listen_to_batches(self) -> BatchCalls:
        """Let `samples` tell whose the rows of a step's tensors are, from what the model is given."""
        if self._hooks is None:
            raise CaptureError("no model is attached")
        self._batches = BatchCalls(self.rows, self.samples, self._hooks.counts)
        return self._batches

    def attach_draft(self, model: nn.Module) -> None:
        """Also listen to the modules of a model that proposes what the attached one verifies, in its `turn`.

        It goes by ``draft``, they by their names behind that, those, too, that both models share.
        """
        audience = self._audience
        self._draft = ListenerSet(model, audience.listener, as_draft, counts=audience.counts)
        self._taps.add(self._draft)
        audience.listen_within(self._draft)

    def turn(self, draft: bool) -> None:
        """Within a step: listen to the draft model's calls from now on, or again to the attached model's."""
        if self._step is None or self._hooks is None or self._draft is None:
            return
        listening, resting = (self._draft, self._hooks) if draft else (self._hooks, self._draft)
        resting.rest()
        listening.resume()

    def begin_step(
        self, step: int | None = None, wanted: bool = True, more_than_a_call: bool = False
    ) -> bool:
        """Start a step (the next number when None); True when it is captured, its hooks alive now.

        A step that is not ``wanted`` is only counted. In one that is ``more_than_a_call`` of the model,
        others may replace what stands for a ``forward``.
        """
        with self._lock:
            if self._closed or self._hooks is None:
                return False
            if self._step is not None:
                self.end_step(extra={"error": "the step was cut short"})
            number = self._next_step if step is None else step
            if number < self._next_step:
                raise CaptureError(f"step {number} has been; the next one is {self._next_step} or later")
            self._next_step = number + 1
            if not (wanted and self.config.selects_step(number)):
                return False
            self._step = number
            self._started = now()
            self._collector.begin_step(number)
            self.rows.begin_step()
            self._hooks.install(more_than_a_call)
            if self._batches is not None:
                self.samples.begin_step()
                self._batches.install(self._hooks.tree)
            if self._draft is not None:
                # Around the attached model's listeners on modules that both share.
                self._draft.install()
                self._draft.rest()
            self._taps.begin_step()
            if self._audience.operators is not None:
                self._audience.operators.begin_step()
            if self._source is not None:
                self._source.begin_step(self._collector)
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
            if self._closed or self._step is None or self._hooks is None or self._pipeline is None:
                return
            number, self._step = self._step, None
            self.captured_steps += 1
            details = {**self._calls_elsewhere(self._hooks), **(extra or {})}
            self._remove_listeners()
            if error is not None:
                details["error"] = class_name(error)
            ended = now()
            self.rows.resume_main()
            problem = None if self._source is None else self._source.end_step()
            if problem is not None:
                details.setdefault("error", problem)
            told = {**self.rows.document(), **self.samples.document(self.rows.chooses)}
            unopened = self._collector.end_step()
            rows = told.pop("rows", rows)
            if tokens is None and (own := self.samples.tokens.document(self.rows.chooses)):
                tokens = functools.partial(list, own)
            extra = {**told, **details}
            end = StepEnd(number, self._started, ended, rows, extra, decided, unopened, tokens)
            self._pipeline.submit(end)
            if not self.config.selects_any_after(number):
                # Nothing more comes that could be stored together with what is there.
                self._pipeline.settle()
                self._give_memory_back()

    def _remove_listeners(self) -> None:
        if self._batches is not None:
            self._batches.remove()
        self._taps.rest()
        if self._draft is not None:
            self._draft.remove()
        if self._hooks is not None:
            self._hooks.remove()

    def _calls_elsewhere(self, hooks: ListenerSet) -> Json:
        """What `step.json` says of calls in other threads; the log says it once."""
        calls = hooks.elsewhere
        calls |= self._taps.elsewhere
        if not calls:
            return {}
        if not self._said_elsewhere:
            self._said_elsewhere = True
            log.warning(
                "%d calls in other threads than the step's own are not captured, of %s; step.json counts"
                " them (calls_in_other_threads)",
                sum(calls.values()),
                ", ".join(list(calls)[:3]) + (", ..." if len(calls) > 3 else ""),
            )
        return {"calls_in_other_threads": calls}

    def _close_hooks(self) -> None:
        """Take the listeners away, and find out what they did not hear."""
        hooks, self._hooks = self._hooks, None
        draft, self._draft = self._draft, None
        self._batches = None
        if draft is not None:
            draft.close()
        if hooks is None:
            return
        hooks.close()
        missed_taps, shown_taps = self._taps.missed(hooks), self._taps.shown
        self._taps.close()
        if self._audience.operators is not None:
            self._audience.operators.close()
        left_out = [name for name in self.code_taps if not shown_taps.get(name)]
        self.remarks += remarks.compiled_taps(left_out if self.captured_steps else ())
        self.remarks += remarks.traced(self.passed_by.by, ModuleTree(hooks.model).modules)
        if not self._has_all_modules:
            return
        if self.captured_steps:
            self.remarks += self._audience.unheard(hooks, self.passed_by)
            self.remarks += remarks.missed_taps(*missed_taps, shown_taps)
        self.remarks += remarks.replaced_within(list(hooks.replaced_within))

    @property
    def _has_all_modules(self) -> bool:
        # A rank has not all of them, and a source tells what it missed by itself.
        return self._source is None and self.run.world_size == 1

    def _say_remarks(self) -> None:
        if self.remarks:
            log.warning("run %s: %s", self.run.shown_url, "\n  ".join(self.remarks))

    def _give_memory_back(self) -> None:
        # Before Python finds out that nobody needs the session any more.
        self._pool.retire()
        self._stager.leave()

    def _submit(self, batch: Batch) -> None:
        if self._pipeline is not None:
            self._pipeline.submit(batch)

    def step_aside(self) -> None:
        """Take the hooks away until the next selected step; for whoever compiles between two steps."""
        with self._lock:
            if self._step is None:
                self._remove_listeners()

    def flush(self) -> None:
        """Wait until every step that has ended is stored or booked as failed."""
        if self._pipeline is not None and not self._closed:
            self._pipeline.flush()

    def detach(self) -> None:
        """Stop capturing and take the hooks away; what is queued is stored by `close`. Safe to repeat."""
        with self._lock:
            self.end_step(extra={"error": "the session was closed in the step"})
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
            self.end_step(extra={"error": "the session was closed in the step"})
            self._closed = True
            self._give_memory_back()
        atexit.unregister(self.close)
        self._close_hooks()
        if self._pipeline is not None:
            self._pipeline.close()
        else:
            close_run(self._sink, self._documents)
        counts = self.ledger
        log.info(
            "run %s: captured %d = stored %d + skipped %d + dropped %d + failed %d %s",
            self.run.shown_url, counts.captured, counts.stored, counts.skipped, counts.dropped, counts.failed,
            dict(sorted(counts.reasons.items())) or "",
        )  # fmt: skip
        if self.captured_steps and not counts.captured:
            self.remarks.append(
                f"no tensor was captured in {self.captured_steps} steps; device_names or module_call_match"
                " leave out everything"
            )
        gradients = self._collector.gradients
        if self.captured_steps and gradients is not None and not gradients.awaited:
            self.remarks.append("log_gradients: no call within a step had a tensor that requires a gradient")
        self._say_remarks()
        first = self._processor.first_error if self._processor else None
        if first is not None and self.config.on_error == "raise":
            lost = f"{counts.failed} tensors could not be stored" if counts.failed else "closing failed"
            raise CaptureError(f"{lost}: {first}") from first

    def abandon(self) -> None:
        """Stop capturing without storing anything: what a forked child does with its parent's session.

        The pipeline's thread does not exist there, and the run belongs to the parent.
        """
        self._closed = True
        self._remove_listeners()


_live: weakref.WeakSet[Session] = weakref.WeakSet()


def _abandon_all() -> None:
    for session in list(_live):
        session.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
