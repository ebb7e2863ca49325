"""The step's bracket: one captured step for each real step of a vLLM model runner."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ....engine.filters.choosing import Choosing
from ....engine.session import Session
from ....layout.drafts import Decided
from ....layout.rows import NO_ROWS
from ..compiled.eager_steps import EagerSteps
from .accepted import drafts_decided
from .choices import ClientChoices
from .draft_scopes import DraftScopes
from .fetched import Fetched
from .row_scopes import RowScopes
from .rows import RowError, RowReader
from .tokens import TokenReader, scheduled_firsts

if TYPE_CHECKING:
    from ....engine.row_injection import RowInjection

log = logging.getLogger("vllm.tlcore")


class StepWrapper:
    """Wraps a model runner's step methods around ``session``; nothing of it can break a step.

    ``session`` may be exchanged between two steps; without one, steps run as if unwrapped.

    A real step is one outside warm-up, not a dummy run, that schedules tokens. It begins with
    ``execute_model`` and ends after ``sample_tokens`` (or ``pool``), or with ``execute_model`` itself
    where that returns the final output. The model's own exceptions pass through unchanged. ``eager``
    is to be set for a runner whose compiled model or CUDA graphs a captured step must leave out. ``details``
    are further keys for each ``step.json``. Of the ranks of a model one ``writes_tokens``.
    """

    def __init__(
        self,
        session: Session | None,
        runner: Any,
        details: Mapping[str, Any] | None = None,
        writes_tokens: bool = True,
    ) -> None:
        self.details = dict(details or {})
        self.eager: EagerSteps | None = None
        self._reader = RowReader(runner)
        self._runner = runner
        self._tokens = TokenReader(runner, writes_tokens)
        self._choices = ClientChoices(runner)
        self.fetched = Fetched()
        self._scopes = RowScopes(runner, self._reader, self._tokens)
        DraftScopes(self._scopes, runner, self._draft)
        self.session = session
        self._warming = 0
        self._open = False
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
        self._tokens.forget()
        self._choices.begin_run(None if session is None else session.config)

    @property
    def within_step(self) -> bool:
        """Whether a captured step has begun and not ended."""
        return self._open and self._session is not None

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
            if self.session is None or self._warming or kwargs.get("dummy_run"):
                return original(scheduler_output, *args, **kwargs)
            if not scheduled:
                # An engine that has nothing left to do says so once of the requests that ended last.
                try:
                    self._note(scheduler_output)
                except Exception as error:
                    self._warn("which requests have ended could not be noted", error)
                return original(scheduler_output, *args, **kwargs)
            self._begin(scheduler_output)
            try:
                with self._eagerly():
                    output = original(scheduler_output, *args, **kwargs)
            except BaseException as error:
                self._end(error)
                raise
            self._pass_is_over()
            if output is not None:
                self._end(output=output)
            return output

        return execute_model

    def _wrap_last(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def last(*args: Any, **kwargs: Any) -> Any:
            try:
                with self._eagerly(draft=True):
                    output = original(*args, **kwargs)
            except BaseException as error:
                self._end(error)
                raise
            self._end(output=output)
            return output

        return last

    def _note(self, scheduler_output: Any) -> None:
        """Note which requests begin, and which have ended."""
        self._reader.begin_step(scheduler_output)
        self._tokens.begin_step(scheduler_output)
        self._choices.begin_step(scheduler_output)
        if self._injection is not None:
            self._injection.forget(getattr(scheduler_output, "finished_req_ids", ()))

    def _begin(self, scheduler_output: Any) -> None:
        self._extra = dict(self.details)
        try:
            self._note(scheduler_output)
            self._open = self._session_begins(scheduler_output)
        except Exception as error:
            self._open = False
            self._warn("a step could not be begun", error)

    def _session_begins(self, scheduler_output: Any) -> bool:
        session = self.session
        if session is None:
            return False
        requests = scheduler_output.num_scheduled_tokens
        choosing = session.choosing(requests, self._choices.of(requests))
        begun = session.begin_step(wanted=self._wants(choosing, scheduler_output), choosing=choosing)
        injection = self._injection
        if begun:
            self.fetched.note(session, self._choices.fetched(requests))
            self._scopes.begin(session.rows, scheduler_output, session.config.keeps_token_ids, injection)
        elif injection is not None:
            injection.passed_by(requests)
        return begun

    @property
    def _injection(self) -> RowInjection | None:
        """What injects into the steps, row by row."""
        return None if self.session is None else self.session.row_injection

    def _wants(self, choosing: Choosing, scheduler_output: Any) -> bool:
        """Whether any row of a step is one of those that are kept, as far as its schedule tells."""
        counts = scheduler_output.num_scheduled_tokens
        if choosing.chooses is None and not choosing.any_window:
            return True
        chosen = [each for each in counts if choosing.keeps(each)]
        # With speculation the scheduler counts positions that may not come to be.
        if not choosing.any_window or getattr(self._runner, "speculative_config", None) is not None:
            return bool(chosen) or choosing.chooses is None
        firsts, prompts = scheduled_firsts(scheduler_output), self._tokens.prompts(chosen)
        for request in chosen:
            known = firsts.get(request), int(counts[request]), prompts.get((request, ""))
            part = choosing.part(request, *known)
            if part is None or part[1]:
                return True
        return False

    def _draft(self, begins: bool) -> None:
        """The draft model's turn begins, or is over."""
        if self._open and self.session is not None:
            self.session.turn(begins)

    @contextmanager
    def _eagerly(self, draft: bool = False) -> Iterator[None]:
        """Where the model, or its ``draft`` model, is compiled, let a captured step run its Python code."""
        if self.eager is None or not self._open:
            yield
            return
        with self.eager.step():
            yield
        if not (draft or self.eager.ran):
            self._extra["not_captured"] = "the step did not run eagerly"
            log.error("a selected step ran compiled, and nothing of it is captured")
            if self._injection is not None:
                self._injection.passed_by(str(row["request_id"]) for row in self._scopes.rows or ())

    def _pass_is_over(self) -> None:
        self._scopes.enter(NO_ROWS)
        problem = self._scopes.problem
        if self._open and problem is not None:
            self._extra["rows_unavailable"] = problem

    def _end(self, error: BaseException | None = None, output: Any = None) -> None:
        if not self._open or self.session is None:
            return
        self._open = False
        try:
            decided = None if error is not None else self._decided(output)
            self.session.end_step(extra=self._extra, error=error, decided=decided, tokens=self._scopes.tokens)
        except Exception as failure:
            self._warn("a step could not be ended", failure)
        self._scopes.end()

    def _decided(self, output: Any) -> Callable[[], Mapping[str, Decided]] | None:
        rows = self._scopes.rows
        if not rows:
            return None
        return drafts_decided(
            self._reader.asked, int(getattr(self._runner, "max_model_len", sys.maxsize)), rows, output
        )

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s (said once): %s", what, error, exc_info=not isinstance(error, RowError))
