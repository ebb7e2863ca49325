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

from ....config.configuration import Config, load_config
from ....engine.new_run import new_run
from ....engine.session import Session
from ....errors import CaptureError, TlcoreError, shareable
from ....record import LEDGER_COLUMNS, Json, RunInfo
from ..carrier import is_carrier
from ..compiled.eager_steps import TAPS, EagerSteps
from ..compiled.hookable import make_hookable
from ..compiled.taps import tap_model
from ..frontend.check import compiles, unknown_vllm
from ..metrics import Publisher
from .ranks import check_place, layout_of
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
        self._rank = int(worker.rank)
        self._session: Session | None = None
        self._end: _RunEnd | None = None
        self._bracket: StepWrapper | None = None
        self._publisher: Publisher | None = None
        # Of runs that ended, since Prometheus expects counters to grow.
        self._before: dict[str, float] = {}
        self._watch_the_end(worker)

    def start(self, carrier: Any) -> Session:
        """Open a carrier's run and bracket the runner's steps; step 0 is the next real one.

        Raises CaptureError when a run is being captured already, and what a session raises at its start.
        """
        worker = self._worker()
        _log_as_vllm_does()
        if self._session is not None:
            raise CaptureError(f"a run is being captured already, {self._session.url}; stop it first")
        config = load_config(carrier["config"] if is_carrier(carrier) else carrier)
        model = worker.model_runner.get_model()
        make_hookable(model)
        session = Session(config, _run(worker, config, carrier if is_carrier(carrier) else {}))
        try:
            eager = _eager_steps(worker)
            tapped = eager is not None and config.compiled == "taps"
            if tapped:
                self._tap_before_warm_up(worker, session, carrier)
            else:
                session.attach(model)
            if self._bracket is None:
                self._bracket = self._bracketed(worker)
            self._bracket.eager = None if tapped else eager
        except BaseException:
            session.close()
            raise
        if self._end is not None:
            self._before = _sum(self._before, self._end.figures())
        self._session, self._end = session, _RunEnd(session)
        if self._publisher is None:
            self._publisher = Publisher(session.run.rank, self._figures)
        self._bracket.session = session
        log.info("intermediate tensors go to %s", session.run.shown_url)
        return session

    def stop(self) -> None:
        """End the capture: the next step runs without hooks. What is queued is stored in the background."""
        if self._session is None or self._end is None or self._bracket is None:
            return
        self._bracket.session = None
        self._session.detach()
        threading.Thread(target=self._end, name="tlcore-close").start()
        self._session = None

    def status(self) -> Json:
        """What this rank captures or captured last, as JSON data: ``state``, ``url`` and the ledger."""
        if self._end is None:
            return {"rank": self._rank, "state": "idle"}
        return {"rank": self._rank, **self._end.status(running=self._session is not None)}

    def finish(self) -> None:
        """End the capture, and return when everything is stored; what a shutdown does."""
        if self._bracket is not None:
            self._bracket.session = None
        self._session = None
        if self._end is not None:
            self._end()
        if self._publisher is not None:
            self._publisher.close()

    def _figures(self) -> Json:
        """The metrics of this rank: counters over all runs, and what the last one is doing."""
        end = self._end
        figures = self._before if end is None else _sum(self._before, end.figures())
        queue = end.queue_bytes if end is not None else 0
        return {**figures, "queue_bytes": queue, "running": int(self._session is not None)}

    def _bracketed(self, worker: Any) -> StepWrapper:
        runner = worker.model_runner
        bracket = StepWrapper(None, runner, _sharding(worker))
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


def _sharding(worker: Any) -> Json:
    """What each ``step.json`` of this rank says about sharded tensors."""
    size = int(worker.vllm_config.parallel_config.tensor_parallel_size)
    found = sharding_of(worker.model_runner.get_model(), int(worker.rank) % size, size)
    return {} if found is None else {"sharding": found}


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + value for name, value in other.items()}


def _eager_steps(worker: Any) -> EagerSteps | None:
    """What makes a captured step eager; None where every step is."""
    return EagerSteps(worker.model_runner) if compiles(worker.vllm_config) else None


def _run(worker: Any, config: Config, carrier: Mapping[str, Any]) -> RunInfo:
    import vllm

    parallel = worker.vllm_config.parallel_config
    replica = getattr(parallel, "data_parallel_index", 0)
    rank = replica * parallel.world_size + worker.rank
    world_size = carrier.get("world_size") or parallel.world_size
    if world_size > 1 and not carrier:
        raise unknown_vllm("the run id did not come from the front end, and the ranks cannot agree on one")
    layout = layout_of(parallel, world_size)
    check_place(layout[rank])
    versions = {"vllm": str(vllm.__version__)}
    run = new_run(config, rank, world_size, carrier.get("run_id"), versions)
    run.document["ranks"] = layout
    return run


def _after(first: Callable[[], None], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first()
        return original(*args, **kwargs)

    return wrapped


class _RunEnd:
    """Closes a session once, whoever asks first; its errors are logged, since shutdown must go on."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._done = False
        self._problem: str | None = None

    def __call__(self) -> None:
        with self._lock:
            if not self._done:
                self._close()
                self._done = True

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait to be stored."""
        return 0 if self._done else self._session.queue_bytes

    def figures(self) -> dict[str, float]:
        """The session's counters, by the names of their metrics."""
        session = self._session
        counts = session.ledger
        return {
            **{f"{name}_tensors": getattr(counts, name) for name in LEDGER_COLUMNS},
            "captured_bytes": counts.bytes_captured,
            "stored_bytes": counts.bytes_stored,
            "blocked_seconds": session.blocked_s,
        }

    def status(self, running: bool) -> Json:
        state = "running" if running else "closed" if self._done else "closing"
        session = self._session
        document = {"state": state, "run_id": session.run_id, "url": session.url}
        failing, waiting = session.failing, session.waiting
        problem = self._problem or (None if failing is None else shareable(failing))
        if problem is not None:
            document["problem"] = problem
        if waiting is not None:
            document["waiting"] = waiting
        return {**document, "ledger": session.ledger.to_json()}

    def _close(self) -> None:
        session = self._session
        try:
            session.close()
            log.info("intermediate tensors in %s: %s", session.run.shown_url, session.ledger.to_json())
        except TlcoreError as error:
            self._problem = str(error)
            log.error("the run %s could not be stored whole: %s", session.run.shown_url, error)
        except Exception as error:
            self._problem = f"the run could not be closed: {type(error).__name__}"
            log.exception("the run %s could not be closed", session.run.shown_url)


def add_methods(module: ModuleType) -> None:
    """Give every worker the methods that `remote.Remote` calls in it. Safe to repeat."""
    module.WorkerBase.tlcore_start = _start
    module.WorkerBase.tlcore_stop = _stop
    module.WorkerBase.tlcore_status = _status


# A remote call that raises may leave vLLM's executor waiting, so each of them answers with a document.


def _start(worker: Any, carrier: Json) -> Json:
    try:
        capture_of(worker).start(carrier)
    except Exception as error:
        log.debug("the capture could not be started", exc_info=True)
        kind = type(error).__name__ if isinstance(error, TlcoreError) else CaptureError.__name__
        text = str(error) if isinstance(error, TlcoreError) else f"{type(error).__name__}: {error}"
        return {"rank": int(worker.rank), "state": "refused", "error": kind, "problem": text}
    return _status(worker)


def _stop(worker: Any) -> Json:
    try:
        capture_of(worker).stop()
        return _status(worker)
    except Exception as error:
        return {"rank": int(worker.rank), "state": "refused", "problem": f"{type(error).__name__}: {error}"}


def _status(worker: Any) -> Json:
    try:
        return capture_of(worker).status()
    except Exception as error:
        return {"rank": int(worker.rank), "state": "refused", "problem": f"{type(error).__name__}: {error}"}
