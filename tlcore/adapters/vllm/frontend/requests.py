"""Requests that choose their own capture: wrong choices are refused before a request is admitted.

Over HTTP that is where the sampling parameters are made of the request's body, before an answer begins,
streamed or not; in Python where an engine takes a request up. What a run allows is known from what its
workers publish, as any of several API servers, or none of them, may have started it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import ModuleType
from typing import Any

from ....config.configuration import Config, load_config
from ....config.request import KEY, Allowed, RequestChoice, choice_error, request_choice, unknown_module
from ....engine.filters.choosing import ModuleNames
from ....errors import CaptureError, ConfigError
from ....layout.names import ROOT_DIR
from ..reports import last_change, read_modules, read_reports
from ..salts import keep_apart
from .check import serves_endpoint
from .deliveries import MARK, TakenError, delivery_of, is_of_this_request, mark_delivery

_PATCHED = "__tlcore__"
# What this process started or was started with, for workers on other machines; they publish nothing here.
_known: list[Config] = []
# Also the runs before it, as many as a worker remembers, whose requests can still be fetched.
_opened: deque[Config] = deque(maxlen=16)
# The run of this process that injects results of another, if any.
_injecting: list[str] = []
# When and of whom the reports last told whether they inject, and that: every request asks.
_told: list[Any] = []
_REPEATING = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"


def remember(carrier: Any) -> None:
    """A run begins with this carrier's configuration; with None, an engine without one."""
    _known[:] = [] if carrier is None else [load_config(carrier["config"])]
    _injecting[:] = [str(carrier["run_id"]) for each in _known if each.inject is not None]
    _opened.extendleft(_known)


def has_ended(run_id: str) -> None:
    """A run of this process has been ended."""
    if run_id in _injecting:
        _injecting.clear()


def _injects() -> bool:
    """Whether results are injected into what requests of this front end compute from now on."""
    # Of several API servers any may have begun.
    if not _injecting and not serves_endpoint():
        return False
    changed = last_change()
    if changed is None or [changed, *_injecting] != _told[:-1]:
        reports = [each for each in read_reports() if each.alive]
        found = any(each.document.get("injects") for each in reports) if reports else bool(_injecting)
        _told[:] = changed, *_injecting, found
    return bool(_told[-1])


def storage_options(url: str) -> dict[str, Any] | None:
    """With which options a run of this process is opened; None where the environment says all."""
    fitting = [each for each in _opened if _lies_in(url, each.output_dir)]
    if not fitting:
        return None
    # One place may lie in another; of runs in the same place the last counts, which comes first.
    nearest = max(fitting, key=lambda each: len(each.output_dir.rstrip("/")))
    found: dict[str, Any] | None = nearest.backend_options.get("storage_options")
    return found


def _lies_in(url: str, place: str) -> bool:
    return f"{url}/".startswith(f"{place.rstrip('/')}/")


def _check_given(params: Any) -> None:
    """Check what the body of an HTTP request says, and give the answer a token if it is to be fetched.

    Raises a ValueError that names the wrong key, which vLLM's server answers with 400.
    """
    _check(params)


def _check_taken(params: Any) -> None:
    """Check what a request says that an engine takes up, whoever made it. Raises as `_check_given`."""
    extra = getattr(params, "extra_args", None) or {}
    # One that has the mark of its own delivery was checked when that was made.
    if MARK not in extra or not is_of_this_request(params):
        _check(params)


def _check(params: Any) -> None:
    try:
        choice = _choice(getattr(params, "extra_args", None) or {})
        if choice is not None and choice.deliver:
            _check_ids()
            mark_delivery(params)
    except ConfigError as error:
        raise _refused()(error) from None
    except CaptureError as error:
        raise _undeliverable(error) from None


def _check_ids() -> None:
    """Refuse to deliver where the engine's ids are the clients', of whom two may give the same."""
    from vllm import envs

    if getattr(envs, _REPEATING, False):
        problem = f"nothing is delivered by a server with {_REPEATING}, where ids may repeat."
        raise choice_error(("deliver",), problem, "Leave it out.")


def _check_beams(request: Any) -> None:
    """Refuse any choice of a beam search: vLLM makes new sampling parameters for each beam, without it."""
    if _chosen(request) is not None:
        problem = f"vLLM's beam search does not hand {KEY} on to its beams."
        hint = f"Leave out use_beam_search or {KEY}."
        raise _refused()(ConfigError("$.use_beam_search", problem, hint))


def _check_waits(request: Any) -> None:
    """Refuse to deliver what is answered before it is computed: only its own answer carries a token."""
    if getattr(request, "background", False):
        choice = _chosen(request)
        if choice is not None and choice.deliver:
            problem = "what is computed in the background is not delivered."
            raise _refused()(ConfigError("$.background", problem, f"Leave out background or {KEY}.deliver."))


def _chosen(request: Any) -> RequestChoice | None:
    """What the body of an HTTP request chooses. Raises as `_check_given`."""
    try:
        return _choice(getattr(request, "vllm_xargs", None) or {})
    except ConfigError as error:
        raise _refused()(error) from None


def _choice(extra: Mapping[str, Any]) -> RequestChoice | None:
    """What a request chooses, if anything. Raises ConfigError where it may not."""
    if MARK in extra:
        raise ConfigError(f"$.{MARK}", "no request may give this key.", "Leave it out.")
    given = extra.get(KEY)
    choice = None if given is None else request_choice(given)
    if choice is not None:
        _check_allowed(choice)
    return choice


def _undeliverable(error: CaptureError) -> Exception:
    """What vLLM's server answers with 409 or 503, where it lets errors say that."""
    from vllm import exceptions

    cls: Any = getattr(exceptions, "GracefulHTTPError", None)
    if cls is None:
        return _refused()(ConfigError("$.tlcore.deliver", f"{error}."))
    taken = isinstance(error, TakenError)
    status = HTTPStatus.CONFLICT if taken else HTTPStatus.SERVICE_UNAVAILABLE
    found: Exception = cls(str(error), status)
    return found


def _check_allowed(choice: RequestChoice) -> None:
    reports = [each for each in read_reports() if each.alive]
    known = [Allowed.from_json(each.document["allowed"]) for each in reports if "allowed" in each.document]
    elsewhere = [] if reports else list(map(Allowed.of, _known))
    refusals = [each.refusal(choice) for each in known or elsewhere or [Allowed()]]
    if refusals[0] is not None and all(refusals):
        raise refusals[0]
    if choice.modules is not None and not choice.leaves_out:
        names = read_modules({each.run_id for each in reports if "allowed" in each.document})
        for place, wanted in enumerate(choice.modules):
            if names and not _selects_any(wanted, names):
                raise unknown_module(place, wanted, names)


@functools.lru_cache(maxsize=4096)
def _selects_any(wanted: str, names: frozenset[str]) -> bool:
    """Whether a pattern selects any of the modules; the server answers nobody while it is found out."""
    if "*" not in wanted and wanted not in ("", ROOT_DIR):
        return wanted in names
    chosen = ModuleNames([wanted])
    return any(name in chosen for name in names)


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
    if original is None or hasattr(original, _PATCHED):
        return

    @functools.wraps(original)
    def from_optional(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        _check_given(made)
        return made

    from_optional.__dict__[_PATCHED] = True
    cls.from_optional = staticmethod(from_optional)


def patch_bodies(module: ModuleType) -> None:
    """Refuse what vLLM would lose of choices, in the classes of a server's requests. Safe to repeat."""
    for cls in list(vars(module).values()):
        for method, check in (("to_beam_search_params", _check_beams), ("to_sampling_params", _check_waits)):
            original = vars(cls).get(method) if isinstance(cls, type) else None
            if original is not None and not hasattr(original, _PATCHED):
                setattr(cls, method, _refusing(original, check))


def _refusing(original: Callable[..., Any], check: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self)
        return original(self, *args, **kwargs)

    made.__dict__[_PATCHED] = True
    return made


def patch_input(module: ModuleType) -> None:
    """Refuse wrong choices where an engine takes a request up; keep injected ones apart. Safe to repeat."""
    cls = module.InputProcessor
    original = getattr(cls, "process_inputs", None)
    if original is None or hasattr(original, _PATCHED):
        return

    @functools.wraps(original)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **more: Any) -> Any:
        _check_taken(params)
        made = original(self, request_id, prompt, params, *args, **more)
        if _injects():
            keep_apart(made)
        return made

    process_inputs.__dict__[_PATCHED] = True
    cls.process_inputs = process_inputs
    assign = getattr(cls, "assign_request_id", None)
    if assign is not None:
        cls.assign_request_id = staticmethod(_noting(assign))


def _noting(assign: Callable[..., Any]) -> Callable[..., Any]:
    """Note under which id the engine knows a request that is to be fetched."""

    @functools.wraps(assign)
    def assign_request_id(request: Any, *args: Any, **more: Any) -> Any:
        made = assign(request, *args, **more)
        params = getattr(request, "sampling_params", None)
        delivery = delivery_of(params)
        if delivery is not None and params is not None:
            external = getattr(request, "external_req_id", None) or request.request_id
            try:
                delivery.add(str(request.request_id), str(external), int(params.n))
            except CaptureError as error:
                raise _undeliverable(error) from None
        return made

    return assign_request_id
