"""The front end's side of a running engine: start, look at and stop a capture in all of its workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from .... import errors
from ....config.configuration import Config
from ....errors import CaptureError, ConfigError
from ....record import Counts, Json
from ..carrier import KEY, Carrier
from . import check as frontend

START, STOP, STATUS = "tlcore_start", "tlcore_stop", "tlcore_status"
POLL_S = 0.05
_CLOSE_S = 600.0


@dataclass(frozen=True, slots=True)
class Status:
    """What an engine captures, or captured last.

    ``state`` is ``idle`` (nothing yet), ``running``, ``closing`` (stopped, still storing) or ``closed``.
    ``ledger`` is the sum over ``ranks``, each rank's own document; ``problem`` says what could not be
    stored, ``waiting`` what of it lies in the spill_dir for now.
    """

    state: str
    run_id: str | None
    url: str | None
    ledger: Counts
    problem: str | None
    ranks: tuple[Json, ...]
    waiting: str | None = None

    def to_json(self) -> Json:
        """The status as JSON data."""
        return {
            "state": self.state,
            "run_id": self.run_id,
            "url": self.url,
            "ledger": self.ledger.to_json(),
            "problem": self.problem,
            "waiting": self.waiting,
            "ranks": list(self.ranks),
        }


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
    if carrier["config"]["compiled"] == "taps" and frontend.compiles(vllm_config):
        problem = "taps are traced into the model when the engine starts, not into a running one."
        raise ConfigError("$.compiled", problem, 'Attach with "eager-steps".')
    carrier["world_size"] = frontend.world_size(vllm_config)
    return carrier


def merged(answers: Sequence[Json]) -> Status:
    """One status from the answers of all ranks.

    Raises CaptureError (or the ConfigError or BackendError of a worker) when a rank refused.
    """
    for answer in answers:
        if answer["state"] == "refused":
            kind = getattr(errors, str(answer.get("error")), CaptureError)
            text = f"rank {answer['rank']}: {answer['problem']}"
            raise (CaptureError if kind is ConfigError else kind)(text)
    states = [str(answer["state"]) for answer in answers]
    state = next((each for each in ("running", "closing", "closed") if each in states), "idle")
    ledger = Counts()
    for answer in answers:
        ledger.add(Counts.from_json(answer.get("ledger", {})))
    first = answers[0] if answers else {}
    return Status(
        state,
        first.get("run_id"),
        first.get("url"),
        ledger,
        _first(answers, "problem"),
        tuple(answers),
        _first(answers, "waiting"),
    )


def _first(answers: Sequence[Json], key: str) -> str | None:
    return next((str(answer[key]) for answer in answers if key in answer), None)


class attach:  # noqa: N801 - a context manager reads like a function
    """Captures a running engine from here on, until the ``with`` block ends or `detach` is called.

    ``llm`` is a `vllm.LLM` (or an `LLMEngine`), in this process or with workers of its own. ``config`` is
    the configuration as a mapping or JSON text, ``keys`` go over it; ``log_step_ids`` count from here.
    Requests must not be under way in another thread. Raises ConfigError or BackendError for what the
    front end can see, CaptureError when a worker refuses, such as while another run is being captured.
    """

    def __init__(self, llm: Any, config: Config | Mapping[str, Any] | str | None = None, **keys: Any) -> None:
        engine = getattr(llm, "llm_engine", llm)
        self._call: Callable[..., list[Json]] = engine.collective_rpc
        self._vllm_config = engine.vllm_config
        self._attached = False
        self._start(config, keys)

    @property
    def url(self) -> str:
        """The run's directory, a path or URL that `tlcore.open_run` takes."""
        return self._url

    @property
    def ledger(self) -> Counts:
        """What became of every captured tensor, over all ranks."""
        return self.status().ledger

    def status(self) -> Status:
        """What the workers say now. Raises CaptureError when one of them has another run by now."""
        status = merged(self._call(STATUS))
        if status.url != self._url:
            raise CaptureError(f"the engine captures another run by now, {status.url}, not {self._url}")
        return status

    def change(self, config: Config | Mapping[str, Any] | str | None = None, **keys: Any) -> None:
        """End this run and start another with a new configuration; its steps count from 0 again.

        When the new configuration is refused, this run goes on.
        """
        carrier = prepare(_with_keys(config, keys), self._vllm_config)
        self.detach()
        self._send(carrier)

    def detach(self) -> Status:
        """End the capture; returns when everything is stored. Safe to repeat.

        Raises CaptureError when something could not be stored and ``on_error`` is ``"raise"``.
        """
        if not self._attached:
            return self.status()
        self._attached = False
        merged(self._call(STOP))
        deadline = time.monotonic() + _CLOSE_S
        while (status := self.status()).state == "closing":
            if time.monotonic() > deadline:
                raise CaptureError(f"the run {self._url} is not stored after {_CLOSE_S:.0f} s")
            time.sleep(POLL_S)
        if status.problem is not None and self._raises:
            raise CaptureError(status.problem)
        return status

    def _start(self, config: Any, keys: dict[str, Any]) -> None:
        self._send(prepare(_with_keys(config, keys), self._vllm_config))

    def _send(self, carrier: Carrier) -> None:
        try:
            status = merged(self._call(START, args=(dict(carrier),)))
        except errors.TlcoreError:
            # Some ranks may have started, and a run of only some of them is worth nothing.
            self._stop_run(carrier["run_id"])
            raise
        self._url, self._attached = str(status.url), True
        self._raises = carrier["config"]["on_error"] == "raise"

    def _stop_run(self, run_id: str) -> None:
        answers = self._call(STATUS)
        if any(answer.get("run_id") == run_id for answer in answers):
            self._call(STOP)

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


def _with_keys(config: Config | Mapping[str, Any] | str | None, keys: dict[str, Any]) -> Any:
    if not keys:
        return config
    from ....config.configuration import load_config

    return load_config(config, **keys)
