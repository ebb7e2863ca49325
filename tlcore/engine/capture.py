"""`tlcore.capture`: a ``with`` block in which each call of a model is one step of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from ..config.configuration import load_config
from ..errors import CaptureError, ConfigError
from ..layout.structure import class_name
from ..protocols import Sink
from ..record import Counts
from .hooks.root_hooks import RootHooks, compiled_meanwhile, refuse_unreachable
from .new_run import new_run
from .session import Session

log = logging.getLogger("tlcore")


class capture:  # noqa: N801 - a context manager reads like a function
    """Capture the submodules of a model while the ``with`` block runs; one call of it is one step.

    ``config`` and ``keys`` are the configuration (`tlcore.config.configuration.Config`); ``backend`` may
    also be an object with the `Sink` protocol. Raises ConfigError, BackendError or CaptureError
    before the block.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any] | str | None = None,
        *,
        inline: bool = False,
        **keys: Any,
    ) -> None:
        backend = keys.get("backend")
        sink = None
        if backend is not None and not isinstance(backend, (str, Mapping)):
            if isinstance(backend, type):
                raise CaptureError(f"backend={backend.__name__} is a class; give an instance of it")
            if not isinstance(backend, Sink):
                raise CaptureError(
                    f"backend={class_name(backend)} lacks open, write, commit_step or close (tlcore.Sink)"
                )
            sink = keys.pop("backend")
        self.config = load_config(config, **keys)
        if self.config.cuts_rows:
            problem = "rows, request_ids and sample_rate choose rows of requests, which only vLLM knows."
            raise ConfigError("$", problem, "Leave them out.")
        self._model = model
        self._inline = inline
        self._sink = sink
        self._session: Session | None = None
        self._bracket = RootHooks(lambda: self.session.begin_step(), self._end_step)
        self._entered = False

    @property
    def session(self) -> Session:
        """The session behind this capture; CaptureError before the block or when not enabled."""
        if self._session is None:
            raise CaptureError("nothing is captured: the capture is not entered, or `enabled` is false")
        return self._session

    @property
    def url(self) -> str:
        """The run's directory, a path or URL that `tlcore.open_run` takes; empty when not enabled."""
        return self.session.url if self.config.enabled else ""

    @property
    def ledger(self) -> Counts:
        """What became of every captured tensor; final after the block."""
        return self.session.ledger if self.config.enabled else Counts()

    def __enter__(self) -> capture:
        if self._entered:
            raise CaptureError("this capture is active already; make another one to capture the model twice")
        if not self.config.enabled:
            return self
        refuse_unreachable(self._model)
        backend = class_name(self._sink) if self._sink is not None else None
        run = new_run(self.config, backend=backend)
        self._session = Session(self.config, run, self._sink, self._inline)
        root = self._session.attach(self._model, root_hooked=True)
        self._bracket.install(self._model, root)
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        self._bracket.remove()
        if self._session is None:
            return
        self._say_what_passed_by()
        try:
            self._session.close()
        except CaptureError:
            # The block's own exception must not be hidden behind ours.
            if error is None:
                raise
            log.warning("the run could not be stored whole", exc_info=True)

    def _end_step(self, error: BaseException | None) -> None:
        self.session.end_step(error=error)

    def _say_what_passed_by(self) -> None:
        compiled = compiled_meanwhile(self._model)
        if compiled is not None:
            log.warning("%s; what ran compiled is not in the run %s", compiled, self.session.run.shown_url)
        elif self._bracket.calls and not self.session.captured_steps:
            log.warning(
                "the model was called %d times, but no step of log_step_ids came, so the run %s has none",
                self._bracket.calls,
                self.session.run.shown_url,
            )
        elif not self._bracket.calls:
            log.warning(
                "no call of the model came by, so the run %s has no step; call the very model that is"
                " captured (a torch.compile'd version of it runs past the capture)",
                self.session.run.shown_url,
            )
