"""The front end's side of a running engine: start, look at and stop a capture in all of its workers."""

from __future__ import annotations

import inspect
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .... import errors
from ....config.configuration import Config
from ....errors import CaptureError, ConfigError
from ....ledger import Counts
from ....record import Json
from ..carrier import KEY, Carrier
from . import check as frontend
from .deaths import remains
from .requests import has_ended, remember, storage_options
from .status import FLUSH, POLL_S, START, STATUS, STOP, Status, merged, raise_refusal

if TYPE_CHECKING:
    from ....reader.request import Request

log = logging.getLogger("vllm.tlcore")
_CLOSE_S = 600.0
# How often it is seen whether an engine that does not answer is alive.
_LOOK_S = 0.2
# How often it is asked whether a flush is over.
_SOON_S = 0.01


def prepare(config: Config | Mapping[str, Any] | str | None, vllm_config: Any) -> Carrier:
    """The carrier of a new run for a running engine.

    Raises ConfigError or BackendError before anything is sent to a worker.
    """
    frontend.check_engine(vllm_config)
    given = config.to_json(redact=False) if isinstance(config, Config) else config
    prepared = frontend.prepare({KEY: {} if given is None else given})
    if KEY not in prepared:
        raise ConfigError("$.enabled", "a capture that is not enabled cannot be attached.")
    carrier: Carrier = prepared[KEY]
    frontend.check_caches(carrier["config"], vllm_config)
    if carrier["config"]["compiled"] == "taps" and frontend.compiles(vllm_config):
        problem = "taps are traced into the model when the engine starts, not into a running one."
        raise ConfigError("$.compiled", problem, 'Attach with "eager-steps".')
    carrier.update(frontend.ranks_of(vllm_config))
    return carrier


class attach:  # noqa: N801 - a context manager reads like a function
    """Captures a running engine from here on, until the ``with`` block ends or `detach` is called.

    ``llm`` is a `vllm.LLM` (or an `LLMEngine`), in this process or with workers of its own. ``config`` is
    the configuration as a mapping or JSON text, ``keys`` go over it; ``log_step_ids`` count from here.
    Requests must not be under way in another thread. Raises ConfigError or BackendError for what the
    front end can see, CaptureError when a worker refuses, such as while another run is being captured.
    """

    def __init__(self, llm: Any, config: Config | Mapping[str, Any] | str | None = None, **keys: Any) -> None:
        engine = getattr(llm, "llm_engine", llm)
        if inspect.iscoroutinefunction(getattr(type(engine), "collective_rpc", None)):
            raise CaptureError(
                "an asynchronous engine cannot be attached to; control its server's capture over HTTP"
            )
        # An engine ends when its owner lets go of it, and with it the processes that it started.
        self._engine = weakref.ref(engine)
        self._attached = False
        self._last: Status | None = None
        self._send(prepare(_with_keys(config, keys), engine.vllm_config))

    @property
    def url(self) -> str:
        """The run's directory, a path or URL that `tlcore.open_run` takes."""
        return self._url

    @property
    def ledger(self) -> Counts:
        """What became of every captured tensor, over all ranks."""
        return self.status().ledger

    def status(self) -> Status:
        """What the workers say now of this run; once it has ended, what they said last.

        Of an engine that has ended or died, what its workers left: the state is then ``closed``, or ``lost``
        with a ``problem`` that says of what they died and what is left of the run.
        """
        if self._last is not None:
            return self._last
        try:
            status = merged(self._ask(STATUS, self._run_id))
        except _SilentError as silence:
            status = self._remains(silence)
        if status.state in ("closed", "lost"):
            self._last = status
        if status.run_id is None:
            raise CaptureError(f"the engine has captured so much since that it has forgotten {self._url}")
        return status

    def request(self, request_id: str, sample: int | None = None) -> Request:
        """What is captured of a request, of all its steps up to now: returns once every rank has stored that.

        ``request_id`` is that of vLLM's output, ``sample`` tells the samples of one with ``n`` > 1 apart.
        Raises MissingError where nothing was captured of it, CaptureError where a rank does not store it.
        """
        if self._attached:
            self._flush()
        from ....reader import open_run

        return open_run(self._url, storage_options=storage_options(self._url)).request(request_id, sample)

    def _flush(self) -> None:
        ticket, deadline = secrets.token_hex(8), time.monotonic() + _CLOSE_S
        while True:
            try:
                answers = self._ask(FLUSH, ticket, [])
            except _SilentError:
                log.debug("the engine does not answer", exc_info=True)
                return
            raise_refusal(answers)
            missing = sorted(answer["rank"] for answer in answers if not answer["done"])
            if not missing:
                return
            if time.monotonic() > deadline:
                raise CaptureError(f"ranks {missing} have not stored what they captured of {self._url}")
            time.sleep(_SOON_S)

    def change(self, config: Config | Mapping[str, Any] | str | None = None, **keys: Any) -> None:
        """End this run and start another with a new configuration; its steps count from 0 again.

        When the new configuration is refused, this run goes on. Raises CaptureError when the engine is gone.
        """
        engine = self._engine()
        if engine is None:
            raise CaptureError(f"the engine has ended, so nothing can follow the run {self._url}")
        carrier = prepare(_with_keys(config, keys), engine.vllm_config)
        self.detach()
        self._send(carrier)

    def detach(self) -> Status:
        """End the capture; returns when everything is stored. Safe to repeat.

        Raises CaptureError when something could not be stored and ``on_error`` is ``"raise"``.
        """
        if not self._attached:
            return self.status()
        self._attached = False
        has_ended(self._run_id)
        try:
            merged(self._ask(STOP, self._run_id))
        except _SilentError:
            log.debug("the engine does not answer", exc_info=True)
        deadline = time.monotonic() + _CLOSE_S
        while (status := self.status()).state in ("closing", "running"):
            if time.monotonic() > deadline:
                raise CaptureError(f"the run {self._url} is not stored after {_CLOSE_S:.0f} s")
            time.sleep(POLL_S)
        if status.problem is not None and self._raises:
            raise CaptureError(status.problem)
        if status.state == "lost":
            log.warning("the run %s was not captured whole: %s", self._run_id, status.problem)
        return status

    def _send(self, carrier: Carrier) -> None:
        self._run_id = str(carrier["run_id"])
        try:
            status = merged(self._ask(START, dict(carrier)))
        except _SilentError as silence:
            raise CaptureError(f"the engine has ended: {silence}") from silence
        except errors.TlcoreError:
            # Some ranks may have started, and a run of only some of them is worth nothing.
            self._ask(STOP, self._run_id)
            raise
        remember(carrier)
        self._url, self._attached, self._last = str(status.url), True, None
        self._raises = carrier["config"]["on_error"] == "raise"

    def _ask(self, method: str, *arguments: Any) -> list[Json]:
        """The answers of all workers. Raises _SilentError where there is no engine any more."""
        engine = self._engine()
        if engine is None:
            raise _SilentError("nobody holds the engine any more")
        resources = getattr(getattr(engine, "engine_core", None), "resources", None)
        if not hasattr(resources, "engine_dead"):
            # In this process, whose thread runs the steps too.
            try:
                return list(engine.collective_rpc(method, args=arguments))
            except Exception as error:
                # The executor of several workers, one of which may have died.
                left = remains(self._run_id)
                if left is None or left.state != "lost":
                    raise
                raise _SilentError("the engine has died") from error
        return _patiently(engine, method, arguments, resources)

    def _remains(self, silence: _SilentError) -> Status:
        status = remains(self._run_id)
        if status is not None:
            # As it was given: a worker's file shows it without secrets.
            return replace(status, url=self._url)
        problem = f"the engine has ended, and its workers left no word of the run: {silence}"
        return Status("lost", self._run_id, self._url, Counts(), problem, ())

    def __enter__(self) -> attach:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.detach()
        except Exception:
            # The block's own exception must not be hidden behind ours.
            if error is None:
                raise


class _SilentError(Exception):
    """The engine has ended or died, so it does not answer."""


def _patiently(engine: Any, method: str, arguments: tuple[Any, ...], resources: Any) -> list[Json]:
    """Ask an engine in another process, which may die meanwhile: vLLM would then wait for ever."""
    answers: list[Json] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            answers.extend(engine.collective_rpc(method, args=arguments))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=ask, name="tlcore-ask", daemon=True)
    thread.start()
    while thread.is_alive():
        dead = resources.engine_dead
        thread.join(_LOOK_S)
        if dead and thread.is_alive():
            raise _SilentError("the engine has died")
    if failures:
        if resources.engine_dead or type(failures[0]).__name__ == "EngineDeadError":
            raise _SilentError("the engine has died") from failures[0]
        raise failures[0]
    return answers


def _with_keys(config: Config | Mapping[str, Any] | str | None, keys: dict[str, Any]) -> Any:
    if not keys:
        return config
    from ....config.configuration import load_config

    return load_config(config, **keys)
