"""The step's bracket: one captured step for each real step of a vLLM model runner."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ....engine.hooks.row_filter import Cut
from ....engine.session import Session
from ....record import Json
from ..compiled.eager_steps import EagerSteps
from .request_sampler import RequestSampler
from .rows import RowError, RowReader

log = logging.getLogger("vllm.tlcore")


class StepWrapper:
    """Wraps a model runner's step methods around ``session``; nothing of it can break a step.

    ``session`` may be exchanged between two steps; without one, steps run as if unwrapped.

    A real step is one outside warm-up, not a dummy run, that schedules tokens. It begins with
    ``execute_model`` and ends after ``sample_tokens`` (or ``pool``), or with ``execute_model`` itself
    where that returns the final output. The model's own exceptions pass through unchanged. ``eager``
    is to be set for a runner whose compiled model or CUDA graphs a captured step must leave out. ``details``
    are further keys for each ``step.json``.
    """

    def __init__(
        self,
        session: Session | None,
        runner: Any,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.details = dict(details or {})
        self.eager: EagerSteps | None = None
        self._reader = RowReader(runner)
        self._selection: RequestSampler | None = None
        self.session = session
        self._warming = 0
        self._open = False
        self._rows: list[Json] | None = None
        self._extra: dict[str, Any] = {}
        self._warned: set[str] = set()
        runner.execute_model = self._wrap_execute(runner.execute_model)
        for name in ("sample_tokens", "pool"):
            if hasattr(runner, name):
                setattr(runner, name, self._wrap_last(getattr(runner, name)))

    @property
    def session(self) -> Session | None:
        """What captures the steps now; None where nothing does."""
        return self._session

    @session.setter
    def session(self, session: Session | None) -> None:
        self._session = session
        self._reader.forget()
        chooses = session is not None and session.config.cuts_rows
        self._selection = RequestSampler(session.config, self._reader) if session and chooses else None

    def warm_up(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a worker's method in which no step is real."""

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._warming += 1
            if self.session is not None:
                self.session.step_aside()
            try:
                return original(*args, **kwargs)
            finally:
                self._warming -= 1

        return wrapped

    def _wrap_execute(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            scheduled = getattr(scheduler_output, "total_num_scheduled_tokens", 0)
            if self.session is None or self._warming or kwargs.get("dummy_run") or not scheduled:
                return original(scheduler_output, *args, **kwargs)
            self._begin(scheduler_output)
            try:
                with self._eagerly():
                    output = original(scheduler_output, *args, **kwargs)
            except BaseException as error:
                self._end(error)
                raise
            self._read_rows(scheduler_output)
            if output is not None:
                self._end()
            return output

        return execute_model

    def _wrap_last(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def last(*args: Any, **kwargs: Any) -> Any:
            try:
                output = original(*args, **kwargs)
            except BaseException as error:
                self._end(error)
                raise
            self._end()
            return output

        return last

    def _begin(self, scheduler_output: Any) -> None:
        self._rows, self._extra = None, dict(self.details)
        try:
            self._reader.begin_step(scheduler_output)
            self._open = self._session_begins(scheduler_output)
        except Exception as error:
            self._open = False
            self._warn("a step could not be begun", error)

    def _session_begins(self, scheduler_output: Any) -> bool:
        session, selection = self.session, self._selection
        if session is None:
            return False
        if selection is None:
            return session.begin_step()
        session.find_cut = functools.partial(self._cut, selection, scheduler_output)
        return session.begin_step(wanted=selection.wants(scheduler_output))

    def _cut(self, selection: RequestSampler, scheduler_output: Any) -> Cut | None:
        try:
            return selection.cut(scheduler_output)
        except Exception as error:
            self._warn(
                "a step's tensors are not stored, since the rows of chosen requests are not known", error
            )
            return None

    @contextmanager
    def _eagerly(self) -> Iterator[None]:
        """Where the model is compiled, let a captured step run its Python code."""
        if self.eager is None or not self._open:
            yield
            return
        with self.eager.step():
            yield
        if not self.eager.ran:
            self._extra["not_captured"] = "the step did not run eagerly"
            log.error("a selected step ran compiled, and nothing of it is captured")

    def _read_rows(self, scheduler_output: Any) -> None:
        if not self._open:
            return
        try:
            self._rows, padded = self._reader.rows(scheduler_output)
            if self._selection is not None:
                self._rows = self._selection.rows
            elif padded:
                self._extra["padded_rows"] = padded
        except Exception as error:
            reason = str(error) if isinstance(error, RowError) else f"{type(error).__name__}: {error}"
            self._extra["rows_unavailable"] = reason
            self._warn("request rows are not available", error)

    def _end(self, error: BaseException | None = None) -> None:
        if not self._open or self.session is None:
            return
        self._open = False
        try:
            self.session.end_step(rows=self._rows, extra=self._extra, error=error)
        except Exception as failure:
            self._warn("a step could not be ended", failure)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s (said once): %s", what, error, exc_info=not isinstance(error, RowError))
