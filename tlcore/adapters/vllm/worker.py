"""The worker process: opens the session once the model is loaded, and closes it at shutdown."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from types import ModuleType
from typing import Any

from ...errors import TlcoreError
from ...record import RunInfo
from ...schema import load_config
from ...session import Session, new_run
from .carrier import carried, is_carrier
from .compiled import EagerSteps
from .frontend import mode_name, unknown_vllm
from .hookable import make_hookable
from .steps import StepBracket

log = logging.getLogger("vllm.tlcore")
_MARK = "__tlcore__"
_WARM_UP = ("determine_available_memory", "compile_or_warm_up_model", "execute_dummy_batch")
_WORKER_NEEDS = (*_WARM_UP, "load_model", "shutdown", "model_runner", "rank")
_RUNNER_NEEDS = ("execute_model", "sample_tokens", "get_model")
# Before multiprocessing joins its own threads and queues.
_FIRST = 100


def patch_workers(module: ModuleType) -> None:
    """Instrument each worker after its ``init_device``. Safe to repeat."""
    cls = getattr(module, "WorkerWrapperBase", None)
    original = getattr(cls, "init_device", None)
    if cls is None or original is None:
        # Raised where capture is asked for, not here: without it vLLM must run undisturbed.
        log.debug("vLLM has no WorkerWrapperBase.init_device")
        return
    if hasattr(cls, _MARK):
        return

    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        carrier = carried(getattr(self.vllm_config, "additional_config", None))
        if carrier is not None and not hasattr(self.worker, _MARK):
            setattr(self.worker, _MARK, True)
            _instrument(self.worker, carrier)
        return result

    setattr(cls, _MARK, True)
    cls.init_device = init_device


def _instrument(worker: Any, carrier: Any) -> None:
    """Wrap the worker's ``load_model``: the session starts once there is a model."""
    _require(worker, _WORKER_NEEDS, "the worker")
    _require(worker.model_runner, _RUNNER_NEEDS, "the model runner")
    original = worker.load_model

    @functools.wraps(original)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        worker.load_model = original
        _start(worker, carrier)
        return result

    worker.load_model = load_model


def _require(part: Any, names: tuple[str, ...], what: str) -> None:
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise unknown_vllm(f"{what} {type(part).__name__} has no {', '.join(missing)}")


def _start(worker: Any, carrier: Any) -> None:
    """Open the run, attach the model, and bracket the runner's steps; raises what stops the start."""
    config = load_config(carrier["config"] if is_carrier(carrier) else carrier)
    if not config.enabled:
        return
    model = worker.model_runner.get_model()
    make_hookable(model)
    session = Session(config, _run(worker, config, carrier if is_carrier(carrier) else {}))
    session.attach(model)
    bracket = StepBracket(session, worker.model_runner, _eager_steps(worker))
    for name in _WARM_UP:
        setattr(worker, name, bracket.warm_up(getattr(worker, name)))
    end = _RunEnd(session)
    worker.shutdown = _after(end, worker.shutdown)
    # Not every way an engine ends calls shutdown: an in-process engine may just be forgotten, and a
    # child process skips the interpreter's exit handlers.
    weakref.finalize(worker, end)
    if parent_process() is not None:
        Finalize(session, end, exitpriority=_FIRST)
    log.info("intermediate tensors go to %s", session.url)


def _eager_steps(worker: Any) -> EagerSteps | None:
    """What makes a captured step eager; None where every step is."""
    compilation = worker.vllm_config.compilation_config
    eager = mode_name(compilation.mode) == mode_name(compilation.cudagraph_mode) == "NONE"
    return None if eager else EagerSteps(worker.model_runner)


def _run(worker: Any, config: Any, carrier: Any) -> RunInfo:
    import vllm

    parallel = worker.vllm_config.parallel_config
    replica = getattr(parallel, "data_parallel_index", 0)
    rank = replica * parallel.world_size + worker.rank
    world_size = carrier.get("world_size") or parallel.world_size
    if world_size > 1 and not carrier:
        raise unknown_vllm("the run id did not come from the front end, and the ranks cannot agree on one")
    versions = {"vllm": str(vllm.__version__)}
    return new_run(config, rank, world_size, carrier.get("run_id"), versions)


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
        self._done = False

    def __call__(self) -> None:
        if self._done:
            return
        self._done = True
        session = self._session
        try:
            session.close()
            log.info("intermediate tensors in %s: %s", session.url, session.ledger.to_json())
        except TlcoreError as error:
            log.error("the run %s could not be stored whole: %s", session.url, error)
        except Exception:
            log.exception("the run %s could not be closed", session.url)
