"""Requests that choose their own capture: wrong choices are refused before a request is admitted.

Over HTTP that is where the sampling parameters are made of the request's body, before an answer begins,
streamed or not; in Python where an engine takes a request up. What a run allows is known from what its
workers publish, as any of several API servers, or none of them, may have started it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ....config.configuration import load_config
from ....config.request import KEY, Allowed, RequestChoice, request_choice, unknown_module
from ....engine.filters.choosing import ModuleNames
from ....errors import ConfigError
from ..reports import read_modules, read_reports

_MARK = "__tlcore__"
# What this process started or was started with, for workers on other machines; they publish nothing here.
_known: list[Allowed] = []


def remember(carrier: Any) -> None:
    """A run begins with this carrier's configuration; with None, an engine without one."""
    _known[:] = [] if carrier is None else [Allowed.of(load_config(carrier["config"]))]


def check_choice(params: Any) -> RequestChoice | None:
    """What a request's sampling parameters choose, if anything. Raises a ValueError that names the wrong key.

    It is one that vLLM's server answers with 400.
    """
    given = (getattr(params, "extra_args", None) or {}).get(KEY)
    if given is None:
        return None
    try:
        choice = request_choice(given)
        if choice is not None:
            _check_allowed(choice)
    except ConfigError as error:
        raise _refused()(error) from None
    return choice


def _check_allowed(choice: RequestChoice) -> None:
    reports = [each for each in read_reports() if each.alive]
    known = [Allowed.from_json(each.document["allowed"]) for each in reports if "allowed" in each.document]
    refusals = [each.refusal(choice) for each in (known if reports else _known) or [Allowed()]]
    if refusals[0] is not None and all(refusals):
        raise refusals[0]
    if choice.modules is not None and not choice.leaves_out:
        names = read_modules({each.run_id for each in reports if "allowed" in each.document})
        for place, wanted in enumerate(choice.modules):
            if names and not any(name in ModuleNames([wanted]) for name in names):
                raise unknown_module(place, wanted, names)


@functools.cache
def _refused() -> Callable[[ConfigError], ValueError]:
    """The class of refusals, which vLLM and its server know to be the client's fault."""
    from vllm import exceptions

    base: Any = getattr(exceptions, "VLLMValidationError", ValueError)
    bases = (base,) if issubclass(base, ValueError) else (base, ValueError)

    def init(self: Any, error: ConfigError) -> None:
        base.__init__(self, str(error))
        # Where the fault is, as the error of the OpenAI API has it.
        self.parameter = error.path.removeprefix("$.")

    def text(self: Any) -> str:
        return str(self.args[0])

    made: Any = type("RequestChoiceError", bases, {"__init__": init, "__str__": text})
    return made  # type: ignore[no-any-return]


def patch_sampling(module: ModuleType) -> None:
    """Refuse wrong choices where a server makes sampling parameters. Safe to repeat."""
    cls = module.SamplingParams
    original = getattr(cls, "from_optional", None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def from_optional(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        check_choice(made)
        return made

    from_optional.__dict__[_MARK] = True
    cls.from_optional = staticmethod(from_optional)


def patch_input(module: ModuleType) -> None:
    """Refuse wrong choices where an engine takes a request up. Safe to repeat."""
    cls = module.InputProcessor
    original = getattr(cls, "process_inputs", None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **more: Any) -> Any:
        check_choice(params)
        return original(self, request_id, prompt, params, *args, **more)

    process_inputs.__dict__[_MARK] = True
    cls.process_inputs = process_inputs
