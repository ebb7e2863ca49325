"""What the requests of a step choose of their own capture, as their clients gave it with the sampling."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

from ....config.configuration import Config
from ....config.request import KEY, Allowed, RequestChoice, request_choice
from ....engine.filters.choosing import Choice, ModuleNames
from ....layout.windows import Window

log = logging.getLogger("vllm.tlcore")
LEFT_OUT = Choice(enabled=False)


class ClientChoices:
    """The choices of the requests of a run.

    The front end has refused what is not allowed; of a request that began before the run, which may allow
    less, only that it is to be left out still counts.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._known: dict[str, Choice | None] = {}
        self._config: Config | None = None
        self._notes_requests = False
        self._said = False
        self._fetched: set[str] = set()

    def begin_run(self, config: Config | None) -> None:
        """Another run begins, or None."""
        self._config = config
        self._known.clear()
        self._fetched.clear()

    def begin_step(self, scheduler_output: Any) -> None:
        """Note what new requests choose, of every step, captured or not."""
        for request in getattr(scheduler_output, "finished_req_ids", ()):
            self._known.pop(request, None)
            self._fetched.discard(request)
        self._notes_requests = hasattr(scheduler_output, "scheduled_new_reqs")
        for new in getattr(scheduler_output, "scheduled_new_reqs", ()):
            self._known[new.req_id] = self._read(new.req_id, getattr(new, "sampling_params", None))

    def of(self, requests: Iterable[str]) -> dict[str, Choice]:
        """The choices of those of these requests that choose anything."""
        found = {}
        for request in requests:
            if request not in self._known:
                self._known[request] = self._of_earlier(request)
            choice = self._known[request]
            if choice is not None:
                found[request] = choice
        return found

    def _of_earlier(self, request: str) -> Choice | None:
        """What a request chooses that began before the run.

        The second model runner does not keep it, so that it may have left itself out.
        """
        if hasattr(self._runner, "requests"):
            state = self._runner.requests.get(request)
            return self._read(request, getattr(state, "sampling_params", None))
        return LEFT_OUT if self._notes_requests else None

    def fetched(self, requests: Iterable[str]) -> list[str]:
        """Those of these requests whose clients fetch what is captured of them."""
        return [each for each in requests if each in self._fetched] if self._fetched else []

    def _read(self, request: str, params: Any) -> Choice | None:
        given = (getattr(params, "extra_args", None) or {}).get(KEY)
        if given is None or self._config is None:
            return None
        try:
            choice = request_choice(given)
        except Exception as error:
            if not self._said:
                self._said = True
                log.warning("a request whose choice cannot be read is left out (said once): %s", error)
            return LEFT_OUT
        if choice is None:
            return None
        found = _resolved(choice, self._config)
        if choice.deliver and found is not None and found.enabled:
            self._fetched.add(request)
        return found


def _resolved(choice: RequestChoice, config: Config) -> Choice | None:
    """The choice in a run's terms; None where the run does not allow it."""
    if choice.leaves_out:
        return LEFT_OUT
    if Allowed.of(config).refusal(choice) is not None:
        return None
    modules = None if choice.modules is None else _names(choice.modules)
    window = choice.rows if isinstance(choice.rows, Window) and choice.rows != Window() else None
    return Choice(True, modules, window, choice.rows == "last")


# It keeps which modules it has found, and many requests choose the same.
@functools.lru_cache(maxsize=64)
def _names(modules: tuple[str, ...]) -> ModuleNames:
    return ModuleNames(modules)
