"""``GET /v1/tlcore/requests/ID`` and ``ID.safetensors``: a request's description, and its tensors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Coroutine
from typing import Any

from ....config.validation import unknown_key
from ....errors import ConfigError
from ....reader.request import Request
from ....record import Json
from .deliveries import HEADER, being_answered, find_delivery
from .fetching import (
    Flusher,
    LateError,
    NothingError,
    Room,
    as_safetensors,
    described,
    size_of,
    stored_request,
)
from .requests import storage_options

_SUFFIX = ".safetensors"
# In less time no engine can be asked.
_LEAST_S, _USUAL_S, _LONGEST_S = 0.1, 30.0, 60.0
# How often it is seen whether another API server's answer is complete by now.
_FIRST_LOOK_S, _LATER_LOOK_S = 0.01, 0.2
_KEYS = ("index", "timeout")
_FORMS = {"index": re.compile("[0-9]{1,7}"), "timeout": re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")}
# As HTTP has it, a weight has three digits at most; here as many as there are.
_WEIGHT = re.compile(r"0(\.[0-9]*)?|1(\.0*)?")
# What nobody gets to see, as its client has left; servers log it so.
_CLIENT_LEFT = 499


async def while_connected(request: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """The answer that ``work`` gives, which is given up when the client leaves."""
    from fastapi import Response

    from .paced import left

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=_CLIENT_LEFT)
    finally:
        for each in (working, leaving):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def fetched(request: Any, flusher: Flusher, room: Room) -> Any:
    """The answer. Raises NothingError for an unknown id and for a wrong token, ConfigError, CaptureError."""
    name = str(request.path_params["name"])
    token = request.headers.get(HEADER, "").strip()
    _check_keys(request)
    # An id may end so itself.
    whole = name.endswith(_SUFFIX) and find_delivery(name, token) is None
    public_id = name.removesuffix(_SUFFIX) if whole else name
    deadline = time.monotonic() + _number(request, "timeout", _USUAL_S, _LONGEST_S, _LEAST_S)
    index = int(_number(request, "index", 0, 1 << 20))
    document = await _answered(public_id, token, deadline)
    request_id = _request_of(document, index)
    flush = await flusher.flush({request_id}, max(0.0, deadline - time.monotonic()))

    def find() -> tuple[Request, int]:
        found = stored_request(flush, request_id, storage_options)
        return found, size_of(found) if whole else 0

    found, size = await asyncio.to_thread(find)
    held = await room.take(size, deadline)

    def answer() -> Any:
        body = as_safetensors(found) if whole else json.dumps(described(found, public_id, index)).encode()
        response = _encoded(body, whole, request)
        # Until it is sent, or its client is gone.
        response.held = held
        return response

    return await asyncio.to_thread(answer)


async def _answered(public_id: str, token: str, deadline: float) -> Json:
    """What is known of the request once its answer is complete."""
    pause = _FIRST_LOOK_S
    while True:
        document = find_delivery(public_id, token)
        if document is None:
            raise NothingError(f"there is no such request, or {HEADER} is not the token of its answer")
        if document["answered"]:
            return document
        left = deadline - time.monotonic()
        if left <= 0:
            raise LateError("the request's answer is not complete yet")
        ended = being_answered(document)
        if ended is None or ended.is_set():
            # Another API server's tells by its file alone.
            await asyncio.sleep(min(left, pause))
            pause = min(_LATER_LOOK_S, pause * 1.2)
        else:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ended.wait(), left)


def _check_keys(request: Any) -> None:
    """Refuse what is unknown, since a wrong ``index`` would be answered with another choice's tensors."""
    given = [key for key, _ in request.query_params.multi_items()]
    for number, key in enumerate(given):
        if key not in _KEYS:
            raise unknown_key((), key, _KEYS)
        if key in given[:number]:
            raise ConfigError(f"$.{key}", "it is given more than once.")


def _request_of(document: Json, index: int) -> str:
    """The engine's id of the choice with this index: those of the first prompt come first."""
    items = sorted((int(place), *item) for place, item in document["items"].items())
    first = 0
    for _, request_id, samples in items:
        if index < first + samples:
            return str(request_id if samples == 1 else f"{index - first}_{request_id}")
        first += samples
    raise ConfigError("$.index", f"the answer has {first} choices, of which the first is 0.")


def _number(request: Any, key: str, usual: float, most: float, least: float = 0) -> float:
    text = request.query_params.get(key)
    if text is None:
        return usual
    # Of digits alone: Python reads much else as a number.
    value = float(text) if _FORMS[key].fullmatch(text) else -1.0
    if not least <= value <= most:
        raise ConfigError(f"$.{key}", f"it must be a number from {least:g} to {most:.7g}.")
    return value


def _encoded(body: bytes, whole: bool, request: Any) -> Any:
    """The response, compressed where the client takes that and the package for it is there."""
    from .paced import PacedResponse

    headers = {"Vary": "Accept-Encoding", "Cache-Control": "no-store", "Accept-Ranges": "none"}
    if _takes_zstd(",".join(request.headers.getlist("Accept-Encoding"))):
        try:
            from zstandard import ZstdCompressor
        except ImportError:
            pass
        else:
            body = ZstdCompressor().compress(body)
            headers["Content-Encoding"] = "zstd"
    kind = "application/octet-stream" if whole else "application/json"
    return PacedResponse(body, media_type=kind, headers=headers)


def _takes_zstd(accepted: str) -> bool:
    for each in accepted.lower().replace(" ", "").split(","):
        coding, given, weight = each.partition(";q=")
        if coding == "zstd":
            return not given or (_WEIGHT.fullmatch(weight) is not None and float(weight) > 0)
    return False
