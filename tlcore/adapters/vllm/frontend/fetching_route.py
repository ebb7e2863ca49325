"""``GET /v1/tlcore/requests/ID`` and ``ID.safetensors``: a request's description, and its tensors."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

from ....errors import ConfigError
from ....reader.request import Request
from ....record import Json
from .deliveries import HEADER, find_delivery
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
# How often it is seen whether the answer is complete by now.
_LOOK_S = 0.02


async def fetched(request: Any, flusher: Flusher, room: Room) -> Any:
    """The answer. Raises NothingError for an unknown id and for a wrong token, ConfigError, CaptureError."""
    name = str(request.path_params["name"])
    token = request.headers.get(HEADER, "")
    # An id may end so itself.
    whole = name.endswith(_SUFFIX) and find_delivery(name, token) is None
    public_id = name.removesuffix(_SUFFIX) if whole else name
    deadline = time.monotonic() + _number(request, "timeout", _USUAL_S, _LONGEST_S, _LEAST_S)
    document = await _answered(public_id, token, deadline)
    index = int(_number(request, "index", 0, 1 << 20))
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
        response.tlcore_held = held
        return response

    return await asyncio.to_thread(answer)


async def _answered(public_id: str, token: str, deadline: float) -> Json:
    """What is known of the request once its answer is complete."""
    while True:
        document = find_delivery(public_id, token)
        if document is None:
            raise NothingError(f"there is no such request, or {HEADER} is not the token of its answer")
        if document["answered"]:
            return document
        if time.monotonic() > deadline:
            raise LateError("the request's answer is not complete yet")
        await asyncio.sleep(_LOOK_S)


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
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or (key == "index" and value != int(value)):
        raise ConfigError(f"$.{key}", f"it must be a number from {least:g} to {most:.7g}.")
    return value


def _encoded(body: bytes, whole: bool, request: Any) -> Any:
    """The response, compressed where the client takes that and the package for it is there."""
    from fastapi import Response

    headers = {"Vary": "Accept-Encoding", "Cache-Control": "no-store"}
    if _takes_zstd(request.headers.get("Accept-Encoding", "")):
        try:
            from zstandard import ZstdCompressor
        except ImportError:
            pass
        else:
            body = ZstdCompressor().compress(body)
            headers["Content-Encoding"] = "zstd"
    kind = "application/octet-stream" if whole else "application/json"
    return Response(body, media_type=kind, headers=headers)


def _takes_zstd(accepted: str) -> bool:
    for each in accepted.lower().replace(" ", "").split(","):
        coding, _, weight = each.partition(";q=")
        if coding == "zstd":
            return bool(weight.strip("0.")) or not weight
    return False
