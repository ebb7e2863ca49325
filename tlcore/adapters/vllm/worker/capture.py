"""A worker's capture: at most one session at a time, started, looked at and stopped between two steps."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from types import ModuleType
from typing import Any

from torch import nn

from ....config.configuration import Config, load_config
from ....config.request import Allowed
from ....engine.audience import as_draft
from ....engine.environment import environment
from ....engine.hooks.module_tree import Named
from ....engine.new_run import new_run
from ....engine.session import Session
from ....errors import CaptureError, TlcoreError
from ....locations import redact_url
from ....record import Json, RunInfo
from ..carrier import OVER_HTTP, is_carrier
from ..compiled.eager_steps import TAPS, EagerSteps
from ..compiled.taps import tap_model
from ..frontend.check import compiles, unknown_vllm
from ..module_names import plain_modules
from ..reports import Publisher
from .engine_settings import engine_settings
from .fetched import Flushes
from .pattern_cost import check_cost
from .ranks import check_place, layout_of
from .run_end import Runs
from .sharding import sharding_of
from .steps import StepWrapper

log = logging.getLogger("vllm.tlcore")
MARK = "__tlcore__"
WARM_UP = ("determine_available_memory", "compile_or_warm_up_model", "execute_dummy_batch")
_WORKER_NEEDS = (*WARM_UP, "load_model", "shutdown", "model_runner", "rank")
_RUNNER_NEEDS = ("execute_model", "sample_tokens", "get_model")
# Before multiprocessing joins its own threads and queues.
_FIRST = 100


def capture_of(worker: Any) -> WorkerCapture:
    """The worker's capture, made at first use. Raises CaptureError for a worker of unknown form."""
    found: WorkerCapture | None = getattr(worker, MARK, None)
    if found is None:
        require(worker, _WORKER_NEEDS, "the worker")
        require(worker.model_runner, _RUNNER_NEEDS, "the model runner")
        found = WorkerCapture(worker)
        setattr(worker, MARK, found)
    return found


def _log_as_vllm_does() -> None:
    """Let the engine's warnings look like vLLM's own lines, with level, time and process.

    Unless somebody has said where Python's logs go.
    """
    own, vllm = logging.getLogger("tlcore"), logging.getLogger("vllm")
    if not own.hasHandlers():
        for handler in vllm.handlers:
            own.addHandler(handler)


def require(part: Any, names: tuple[str, ...], what: str) -> None:
    """Raise CaptureError, naming the vLLM version, where ``part`` lacks one of ``names``."""
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise unknown_vllm(f"{what} {type(part).__name__} has no {', '.join(missing)}")


class WorkerCapture:
    """Starts and stops the sessions of one worker, in the thread that runs its steps."""

    def __init__(self, worker: Any) -> None:
        # Weakly, since a worker that is just forgotten must still end its run.
        self._worker: Callable[[], Any] = weakref.ref(worker)
        self._rank = global_rank(worker)
        self._session: Session | None = None
        self._runs = Runs()
        self._bracket: StepWrapper | None = None
        self._publisher: Publisher | None = None
        self._flushes = Flushes()
        self._watch_the_end(worker)

    def start(self, carrier: Any) -> Session:
        """Open a carrier's run and bracket the runner's steps; step 0 is the next real one.

        Raises CaptureError when a run is being captured already, and what a session raises at its start.
        """
        worker = self._worker()
        _log_as_vllm_does()
        if self._session is not None:
            raise CaptureError(
                f"a run is being captured already, {self._session.run.shown_url}; stop it first"
            )
        config = load_config(carrier["config"] if is_carrier(carrier) else carrier)
        model = worker.model_runner.get_model()
        modules = plain_modules(model)
        if is_carrier(carrier) and carrier.get(OVER_HTTP):
            check_cost(config, [*modules, *_names_of_draft(worker.model_runner)])
        session = Session(
            config, _run(worker, config, carrier if is_carrier(carrier) else {}), of_requests=True
        )
        try:
            eager = _eager_steps(worker)
            tapped = eager is not None and config.compiled == "taps"
            if tapped:
                self._tap_before_warm_up(worker, session, carrier)
            else:
                session.attach(model, modules_of=plain_modules)
            draft = _draft_of(worker.model_runner)
            if draft is not None:
                session.attach_draft(draft)
            if self._bracket is None:
                self._bracket = self._bracketed(worker)
            self._bracket.eager = None if tapped else eager
        except BaseException:
            session.close()
            raise
        self._runs.add(session)
        self._session, self._rank = session, session.run.rank
        if self._publisher is None:
            self._publisher = Publisher(self._rank, self._figures)
        self._bracket.session = session
        # The front end refuses requests by these.
        self._publisher.publish_modules(session.run_id, session.modules)
        self._publisher.publish()
        log.info("intermediate tensors go to %s", session.run.shown_url)
        return session

    def stop(self, run_id: str | None = None) -> None:
        """End the capture: the next step runs without hooks. What is queued is stored in the background.

        With a ``run_id``, only if it is that run: another's goes on.
        """
        end = self._runs.last
        if self._session is None or end is None or self._bracket is None:
            return
        if run_id is not None and run_id != self._session.run_id:
            return
        self._bracket.session = None
        self._session.detach()
        threading.Thread(target=end, name="tlcore-close").start()
        self._session = None
        if self._publisher is not None:
            # Who asks from now on to have something delivered is refused.
            self._publisher.publish()

    def status(self, run_id: str | None = None) -> Json:
        """What this rank captures or captured last, as JSON data: ``state``, ``url`` and the ledger.

        With a ``run_id``, what became of that run, if it is one of the last; else the state is ``unknown``.
        Whoever is told that a run is closed finds its last figures published.
        """
        answer = self._status(run_id)
        if answer["state"] == "closed" and self._publisher is not None:
            self._publisher.publish()
        return answer

    def _status(self, run_id: str | None = None) -> Json:
        end = self._runs.last if run_id is None else self._runs.find(run_id)
        if end is None:
            state = {"state": "idle"} if run_id is None else {"state": "unknown", "run_id": run_id}
            return {"rank": self._rank, **state}
        session = self._session
        running = session is not None and session.run_id == end.run_id
        return {"rank": self._rank, **end.status(running)}

    def flush(self, ticket: str, requests: list[str]) -> Json:
        """Have all that was captured until the ``ticket`` was first shown stored; never waits.

        Says whether it is stored (``done``), in what run and steps something of these ``requests`` was
        captured, what could not be stored, and what waits in the spill_dir.
        """
        bracket, session = self._bracket, self._session
        found = {} if bracket is None else bracket.fetched.of(requests)
        ends = [self._runs.find(run_id) for run_id in {each["run_id"] for each in found.values()}]
        states = [end.status(session is not None and session.run_id == end.run_id) for end in ends if end]
        # A run that was stopped is stored when it is closed.
        closed = not any(each["state"] == "closing" for each in states)
        known = {"rank": self._rank, "state": "flushing", "requests": found}
        # A step that has only begun is noted, and its flush begins when it has ended.
        ended = bracket is None or not bracket.within_step
        known["done"] = ended and self._flushes.done(ticket, session) and closed
        told = {key: value for each in states for key, value in each.items() if key in ("problem", "waiting")}
        return {**known, **told}

    def finish(self) -> None:
        """End the capture, and return when everything is stored; what a shutdown does."""
        if self._bracket is not None:
            self._bracket.session = None
        self._session = None
        end = self._runs.last
        if end is not None:
            end()
        if self._publisher is not None:
            self._publisher.close()
        # Whoever still knows this capture must not keep the model alive.
        self._bracket = None

    def _figures(self) -> Json:
        """The metrics of this rank: counters over all runs, and what the last one is doing."""
        session = self._session
        running = int(session is not None)
        status = self._status()
        if "url" in status:
            status["url"] = redact_url(status["url"])
        state = {"queue_bytes": self._runs.queue_bytes, "running": running, "status": status}
        if session is not None:
            state["allowed"] = Allowed.of(session.config).to_json()
            state["injects"] = session.row_injection is not None
        return {**self._runs.figures(), **state}

    def _bracketed(self, worker: Any) -> StepWrapper:
        runner = worker.model_runner
        # The first stage of a pipeline embeds the tokens, and each of its ranks has the same.
        bracket = StepWrapper(None, runner, _sharding(worker), writes_tokens=int(worker.rank) == 0)
        for name in WARM_UP:
            setattr(worker, name, bracket.warm_up(getattr(worker, name)))
        return bracket

    def _tap_before_warm_up(self, worker: Any, session: Session, carrier: Any) -> None:
        """Tap the model in the first method that runs it, which is what compiles it."""

        @functools.cache
        def once() -> None:
            carrier[TAPS] = tap_model(self._worker(), session)

        for name in WARM_UP:
            setattr(worker, name, _after(once, getattr(worker, name)))

    def _watch_the_end(self, worker: Any) -> None:
        worker.shutdown = _after(self.finish, worker.shutdown)
        # Not every way an engine ends calls shutdown: an in-process engine may just be forgotten, and a
        # child process skips the interpreter's exit handlers.
        weakref.finalize(worker, self.finish)
        if parent_process() is not None:
            Finalize(worker, self.finish, exitpriority=_FIRST)


def _draft_of(runner: Any) -> nn.Module | None:
    """The model that proposes tokens, where there is one."""
    draft = runner.get_draft_model() if hasattr(runner, "get_draft_model") else None
    if draft is None:
        draft = getattr(getattr(runner, "drafter", None), "model", None)
    return draft if isinstance(draft, nn.Module) else None


def _names_of_draft(runner: Any) -> list[str]:
    """The names that a draft model's modules are captured by."""
    draft = _draft_of(runner)
    return (
        [] if draft is None else [as_draft(Named(name, draft, ())).name for name, _ in draft.named_modules()]
    )


def _sharding(worker: Any) -> Json:
    """What each ``step.json`` of this rank says about sharded tensors."""
    size = int(worker.vllm_config.parallel_config.tensor_parallel_size)
    found = sharding_of(worker.model_runner.get_model(), int(worker.rank) % size, size)
    return {} if found is None else {"sharding": found}


def global_rank(worker: Any, first: int = 0) -> int:
    """The worker's rank among those of all data-parallel engines, counted from the ``first`` of a run."""
    parallel = worker.vllm_config.parallel_config
    return int(getattr(parallel, "data_parallel_index", 0) * parallel.world_size + worker.rank) - first


def _eager_steps(worker: Any) -> EagerSteps | None:
    """What makes a captured step eager; None where every step is."""
    return EagerSteps(worker.model_runner) if compiles(worker.vllm_config) else None


def _run(worker: Any, config: Config, carrier: Mapping[str, Any]) -> RunInfo:
    import vllm

    parallel, rank = worker.vllm_config.parallel_config, global_rank(worker, carrier.get("first_rank", 0))
    world_size = carrier.get("world_size") or parallel.world_size
    if world_size > 1 and not carrier:
        raise unknown_vllm("the run id did not come from the front end, and the ranks cannot agree on one")
    layout = layout_of(parallel, world_size)
    check_place(layout[rank])
    versions = {"vllm": str(vllm.__version__)}
    run = new_run(config, rank, world_size, carrier.get("run_id"), versions)
    run.document["ranks"] = layout
    if rank == 0:
        model = worker.model_runner.get_model()
        run.document["environment"] = {**environment(model), "engine": engine_settings(worker.vllm_config)}
    return run


def _after(first: Callable[[], None], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first()
        return original(*args, **kwargs)

    return wrapped


def add_methods(module: ModuleType) -> None:
    """Give every worker the methods that the front end calls in it. Safe to repeat."""
    module.WorkerBase.tlcore_start = _start
    module.WorkerBase.tlcore_stop = _stop
    module.WorkerBase.tlcore_status = _status
    module.WorkerBase.tlcore_flush = _flush


# A remote call that raises may leave vLLM's executor waiting, so each of them answers with a document.


def _start(worker: Any, carrier: Json) -> Json:
    def start(capture: WorkerCapture) -> Json:
        capture.start(carrier)
        return capture.status()

    return _answer(worker, start)


def _stop(worker: Any, run_id: str | None = None) -> Json:
    def stop(capture: WorkerCapture) -> Json:
        capture.stop(run_id)
        return capture.status(run_id)

    return _answer(worker, stop)


def _status(worker: Any, run_id: str | None = None) -> Json:
    return _answer(worker, lambda capture: capture.status(run_id))


def _flush(worker: Any, ticket: str, requests: list[str]) -> Json:
    return _answer(worker, lambda capture: capture.flush(ticket, requests))


def _answer(worker: Any, act: Callable[[WorkerCapture], Json]) -> Json:
    try:
        return act(capture_of(worker))
    except Exception as error:
        log.debug("a remote call was refused", exc_info=True)
        kind = type(error).__name__ if isinstance(error, TlcoreError) else CaptureError.__name__
        text = str(error) if isinstance(error, TlcoreError) else f"{type(error).__name__}: {error}"
        return {"rank": global_rank(worker), "state": "refused", "error": kind, "problem": text}
