"""Start, stop and look at a capture over HTTP: a plugin of vLLM's server, off unless it is asked for.

``VLLM_PLUGINS`` must name it. The routes begin with ``/v1``, so vLLM's own API key guards them, and without
a key they refuse to work. The key is often given to every client of the model; so a client chooses what is
captured, but only the operator (``TLCORE_ENDPOINT_OUTPUT_DIR``, ``TLCORE_ENDPOINT_SPILL_DIR``) below which
place it is written, where it waits in an outage, below which place runs lie that may be injected
(``TLCORE_ENDPOINT_INJECT_DIR``; without it none may), and with whose code. What was captured of a request is
opened only by the token that its answer has carried.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from argparse import Namespace
from dataclasses import replace
from typing import Any

from ....config.configuration import Config, load_config
from ....config.patterns import most_steps
from ....errors import BackendError, CaptureError, ConfigError, ReadError, TlcoreError
from ....locations import absolute_location, is_url, redact_url
from ....record import Json
from ....registry import resolve
from ..carrier import OVER_HTTP, Carrier
from ..plugins import ENDPOINT
from .attach import prepare
from .deliveries import TokenMiddleware
from .engines import DeadEngineError, Engines
from .fetching import Flusher, LargeError, LateError, LostError, NothingError, Room
from .fetching_route import fetched, while_connected
from .requests import has_ended, remember
from .status import POLL_S, START, STATUS, STOP, Status, merged

log = logging.getLogger("vllm.tlcore")
PATH = "/v1/tlcore"
ROOT_VARIABLE = "TLCORE_ENDPOINT_OUTPUT_DIR"
SPILL_VARIABLE = "TLCORE_ENDPOINT_SPILL_DIR"
DELIVERY_VARIABLE = "TLCORE_ENDPOINT_DELIVERY"
INJECT_VARIABLE = "TLCORE_ENDPOINT_INJECT_DIR"
_LARGEST_BODY = 1 << 20
# What the patterns of request_ids may take of each request, and no client may make it more.
_MOST_STEPS = 1 << 25
# Longer than this, a client asks again.
_STOP_WAIT_S = 30.0


class EndpointPlugin:
    """What vLLM's entry-point group ``vllm.endpoint_plugins`` asks for."""

    name = ENDPOINT
    required_tasks = None

    def __init__(self) -> None:
        self._engine: Any = None
        self._guarded = False
        self._lock = asyncio.Lock()
        self._flusher = Flusher(self._ask_all)
        self._room = Room()

    def attach_router(self, app: Any) -> None:
        """Add the routes ``/v1/tlcore/start``, ``stop``, ``status`` and ``requests/ID`` to the server."""
        app.add_api_route(f"{PATH}/start", self._answering(self._start), methods=["POST"])
        app.add_api_route(f"{PATH}/stop", self._answering(self._stop), methods=["POST"])
        app.add_api_route(f"{PATH}/status", self._answering(self._status), methods=["GET"])
        app.add_api_route(f"{PATH}/requests/{{name:path}}", self._answering(self._fetch), methods=["GET"])
        app.add_middleware(TokenMiddleware, delivers=lambda: self._guarded)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Learn the engine, which a server that only renders prompts lacks, and whether there is a key."""
        from vllm import envs

        self._engine = engine_client
        self._guarded = any(key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]))
        if not self._guarded:
            log.warning("%s refuses to work: the server has no API key (--api-key)", PATH)

    def _answering(self, act: Any) -> Any:
        """A route's handler: what ``act`` returns as JSON, or its error with the status that fits."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        async def handler(request: Any) -> Any:
            try:
                self._check_usable()
                found = await act(request)
            except TlcoreError as error:
                return JSONResponse(_described(error), status_code=_code(error))
            return JSONResponse(_shown(found)) if isinstance(found, Status) else found

        # FastAPI reads what to pass from the annotations, which are not strings here.
        handler.__annotations__ = {"request": Request}
        return handler

    def _check_usable(self) -> None:
        if not self._guarded:
            raise ForbiddenError(
                "the server has no API key; start it with --api-key to control capture over HTTP"
            )
        if self._engine is None:
            raise CaptureError("this server has no engine, so there is nothing to capture")

    async def _start(self, request: Any) -> Status:
        given = _parsed(await request.body())
        config = await asyncio.to_thread(restricted, given)
        async with self._lock:
            running = await self._ask(STATUS)
            if running.state == "running":
                raise CaptureError(
                    f"a run is being captured already, {_shown(running)['url']}; stop it first"
                )
            # It may try out object storage, which takes time.
            carrier = await asyncio.to_thread(prepare, config, self._engine.vllm_config)
            carrier[OVER_HTTP] = True
            return await self._begin(carrier)

    async def _begin(self, carrier: Carrier) -> Status:
        """Start the run in every engine; of several that ask at once, the first engine's choice is theirs."""
        run_id = str(carrier["run_id"])
        engines = Engines(self._engine)
        try:
            status = merged(await engines.ask(START, dict(carrier), engines=engines.all[:1]))
            if len(engines.all) > 1:
                merged(await engines.ask(START, dict(carrier), engines=engines.all[1:]))
                status = await self._ask(STATUS, run_id)
                if any(answer["state"] != "running" for answer in status.ranks):
                    raise CaptureError("the run was stopped by another request before every engine had begun")
        except TlcoreError:
            # Some ranks may have started, and a run of only some of them is worth nothing; another's goes on.
            await engines.ask(STOP, run_id)
            raise
        remember(carrier)
        return status

    async def _stop(self, request: Any) -> Status:
        given = _parsed(await request.body())
        run_id = given.get("run_id") if isinstance(given, dict) else None
        if run_id is None:
            run_id = (await self._ask(STATUS)).run_id
        if run_id is None:
            return await self._ask(STATUS)
        has_ended(str(run_id))
        await self._ask(STOP, str(run_id))
        deadline = time.monotonic() + _STOP_WAIT_S
        while (status := await self._ask(STATUS, str(run_id))).state == "closing":
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_S)
        return _known(status, str(run_id))

    async def _status(self, request: Any) -> Status:
        run_id = request.query_params.get("run_id")
        if run_id is None:
            return await self._ask(STATUS)
        return _known(await self._ask(STATUS, run_id), run_id)

    async def _fetch(self, request: Any) -> Any:
        """What was captured of one request, as the token in a header opens it."""
        return await while_connected(request, fetched(request, self._flusher, self._room))

    async def _ask_all(self, method: str, *args: Any) -> list[Json]:
        engines = Engines(self._engine)
        return await engines.ask(method, *args)

    async def _ask(self, method: str, *args: Any) -> Status:
        engines = Engines(self._engine)
        return merged(await engines.ask(method, *args), engines.ranks)


def _shown(status: Status) -> Json:
    """A status as every client may see it: the operator's place may be a URL with credentials."""
    found = status.to_json()
    return {**_without_secrets(found), "ranks": [_without_secrets(each) for each in found["ranks"]]}


def _without_secrets(document: Json) -> Json:
    url = document.get("url")
    return document if url is None else {**document, "url": redact_url(str(url))}


def _known(status: Status, run_id: str) -> Status:
    if status.run_id is None:
        raise CaptureError(f"the engine knows no run {run_id}")
    return status


class ForbiddenError(CaptureError):
    """The server's operator has not allowed what was asked for."""


_CODES: dict[type[TlcoreError], int] = {
    ForbiddenError: 403,
    DeadEngineError: 503,
    NothingError: 404,
    LostError: 410,
    LargeError: 413,
    LateError: 504,
    ConfigError: 400,
    BackendError: 502,
    ReadError: 502,
}


def _code(error: TlcoreError) -> int:
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), 409)


def _described(error: TlcoreError) -> Json:
    """An error in the form of the OpenAI API."""
    return {"error": {"message": str(error), "type": type(error).__name__, "code": _code(error)}}


def _parsed(body: bytes) -> Any:
    if len(body) > _LARGEST_BODY:
        raise ConfigError("$", f"the configuration is larger than {_LARGEST_BODY} bytes.")
    try:
        return json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise ConfigError("$", "the request's body is not JSON.", "Send a configuration object.") from None


def restricted(given: Any) -> Config:
    """The configuration that a client gave, if it may be given over HTTP, with the operator's places.

    Raises ConfigError for an invalid one, ForbiddenError for a place, backend or option that only the
    server's operator may choose.
    """
    if not isinstance(given, dict):
        raise ConfigError("$", "the configuration must be a JSON object.")
    root = os.environ.get(ROOT_VARIABLE) or load_config({}).output_dir
    backend = given.get("backend")
    name = backend.get("name") if isinstance(backend, dict) else backend
    # Before it is resolved, since that may already import it.
    if ":" in str(name):
        raise ForbiddenError(
            "$.backend: over HTTP a backend is chosen by its registered name, not by an import path"
        )
    if given.get("spill_dir") is not None:
        raise ForbiddenError(f"$.spill_dir: over HTTP it is the operator's {SPILL_VARIABLE}")
    if given.get("delivery") and os.environ.get(DELIVERY_VARIABLE) != "1":
        raise ForbiddenError(f"$.delivery: over HTTP it takes the operator's {DELIVERY_VARIABLE}=1")
    config = load_config(given if _names_place(given) else {**given, "output_dir": root})
    if sum(map(most_steps, config.request_ids or ())) > _MOST_STEPS:
        problem = "over HTTP patterns of requests repeat no groups, and little else."
        raise ConfigError("$.request_ids", problem, "Leave out .* at either end, and list alternatives.")
    if config.inject is not None:
        injected = os.environ.get(INJECT_VARIABLE)
        if not injected or not _lies_below(config.inject.run, injected):
            text = f"over HTTP the run must lie below the operator's {INJECT_VARIABLE}"
            raise ForbiddenError(f"$.inject.run: {text}")
    if not _lies_below(config.output_dir, root):
        text = f"over HTTP the output must lie below the operator's {ROOT_VARIABLE}"
        raise ForbiddenError(f"$.output_dir: {text}")
    private = sorted(set(config.backend_options) - config.public_options)
    if private:
        raise ForbiddenError(f"$.backend.{private[0]}: this option may not be given over HTTP")
    spill_dir = os.environ.get(SPILL_VARIABLE)
    if spill_dir and resolve(config.backend).origin == "built-in":
        return replace(config, spill_dir=spill_dir)
    return config


def _names_place(given: dict[str, Any]) -> bool:
    backend = given.get("backend")
    return "output_dir" in given or (isinstance(backend, dict) and "url" in backend)


def _lies_below(place: str, root: str) -> bool:
    if is_url(place) != is_url(root):
        return False
    if is_url(place):
        # No protocol's client is trusted to leave "..", queries or fragments alone.
        if ".." in place.split("/") or any(mark in place for mark in "?#@%\\"):
            return False
        return place == root.rstrip("/") or place.startswith(f"{root.rstrip('/')}/")
    # As it is found later: "~" is somebody's home, wherever the server was started.
    real, base = (os.path.realpath(absolute_location(path)) for path in (place, root))
    return os.path.commonpath([real, base]) == base
