"""Requests whose clients fetch what was captured of them: each has a token that its answer alone carries.

A server's API key is often shared, so what opens a request is a random token, of which only a hash is kept,
in files of the directory that a front end's processes share: another API server may be asked later.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ....config.request import choice_error
from ....errors import CaptureError
from ....record import Json
from ..reports import shared_directory

# The header of the answer, and of the request that fetches.
HEADER = "X-Tlcore-Token"
# Where sampling parameters say which delivery they are of; no secret, and not to be given by a client.
MARK = "tlcore_delivery"
_SUFFIX = ".delivery"
_KEPT_S = 3600.0
_MOST_KEPT = 4096
# So many deliveries are made between two looks for old ones.
_LOOK_EVERY = 256
log = logging.getLogger("vllm.tlcore")


class TakenError(CaptureError):
    """Another request that can be fetched has the same id."""


class Delivery:
    """One HTTP request whose client fetches it: ``items`` are its prompts' requests in the engine.

    ``answered`` is whether the answer is complete; ``over`` is set once it is, or never will be.
    """

    def __init__(self, public_id: str, path: Path, token: str) -> None:
        self.public_id = public_id
        self.mark = secrets.token_hex(8)
        self.over = asyncio.Event()
        self._path = path
        self._document: Json = {
            "id": public_id,
            "token": _digest(token),
            "answered": False,
            "items": {},
        }

    def add(self, request_id: str, external_id: str, samples: int) -> None:
        """A prompt's request is admitted, under the id that the engine knows it by. Raises TakenError.

        Nothing is written: it is in the middle of vLLM's own work, and nobody asks before the answer's end.
        """
        items = self._document["items"]
        rest = external_id.removeprefix(f"{self.public_id}-")
        place = rest if rest.isdigit() else str(len(items))
        if place in items:
            raise TakenError(f"the request {self.public_id!r} has two prompts with the number {place}")
        items[place] = [request_id, samples]

    def end(self, good: bool) -> None:
        """The answer is over; where it is ``good``, its client has the token and may come. Raises OSError.

        A file that another request has made meanwhile, this one being forgotten, is left as it is.
        """
        self.over.set()
        if self._is_anothers():
            return
        try:
            if good:
                self._document["answered"] = True
                self._write()
        except OSError:
            good = False
            raise
        finally:
            if not good:
                self._path.unlink(missing_ok=True)

    def begin(self) -> None:
        """Take the id. Raises TakenError, and OSError with nothing left behind."""
        try:
            self._make()
        except FileExistsError:
            if not _is_over(self._path):
                raise TakenError(f"a request with the id {self.public_id!r} can be fetched already") from None
            self._path.unlink(missing_ok=True)
            self._make()
        try:
            self._write()
        except OSError:
            self._path.unlink(missing_ok=True)
            raise

    def _make(self) -> None:
        os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _is_anothers(self) -> bool:
        found = _read(self._path)
        return found is not None and found.get("token") != self._document["token"]

    def _write(self) -> None:
        part = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
                json.dump(self._document, file)
            part.rename(self._path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


class Asked:
    """The HTTP request that is being answered, and its delivery, if it asks for one."""

    def __init__(self, scope: Any) -> None:
        self._scope = scope
        self.token: str | None = None
        self.delivery: Delivery | None = None

    @property
    def public_id(self) -> str | None:
        """The id in the answer's body, as the server notes it before it makes sampling parameters."""
        state = self._scope.get("state") or {}
        return getattr(state.get("request_metadata"), "request_id", None)

    def deliver(self) -> Delivery:
        """The request's delivery, made when first asked for. Raises ConfigError, TakenError."""
        if self.delivery is None:
            public_id = self.public_id
            if public_id is None:
                problem = "only answers of completions, chat and responses can be fetched."
                raise choice_error(("deliver",), problem, "Leave it out.")
            token = secrets.token_urlsafe(32)
            made = Delivery(public_id, _path_of(public_id), token)
            _forget_some()
            made.begin()
            self.token, self.delivery = token, made
            _here[made.mark] = made
        return self.delivery


_asked: ContextVar[Asked | None] = ContextVar("tlcore_asked", default=None)
# The deliveries of this process that are being answered.
_here: dict[str, Delivery] = {}


class TokenMiddleware:
    """Puts the token of a request that is fetched into its answer's header."""

    def __init__(self, app: Any, delivers: Callable[[], bool]) -> None:
        self._app = app
        # Whether the server is one that delivers, which it knows when it has started.
        self._delivers = delivers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http" or not self._delivers():
            await self._app(scope, receive, send)
            return
        asked, good, gone = Asked(scope), False, False

        async def receive_until_gone() -> Any:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def send_with_token(message: Any) -> None:
            nonlocal good
            if message["type"] == "http.response.start" and asked.token is not None:
                # A client that left before has no token, and may ask again under the same id.
                good = message["status"] == 200 and not gone
                if good:
                    header = (HEADER.lower().encode(), asked.token.encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        before = _asked.set(asked)
        try:
            await self._app(scope, receive_until_gone, send_with_token)
        finally:
            _asked.reset(before)
            _end(asked.delivery, good)


def _end(delivery: Delivery | None, good: bool) -> None:
    if delivery is not None:
        _here.pop(delivery.mark, None)
        try:
            delivery.end(good)
        except OSError as error:
            log.error("the request %s cannot be fetched: %s", delivery.public_id, error.strerror)


def mark_delivery(params: Any) -> None:
    """Let sampling parameters say which delivery they are of.

    Raises ConfigError, TakenError, and CaptureError where the disk does not take it.
    """
    asked = _asked.get()
    if asked is None:
        problem = "only a server with the plugin tlcore.endpoint and an API key delivers."
        raise choice_error(("deliver",), problem, "In Python, attached.request(id) gives the same.")
    try:
        mark = asked.deliver().mark
    except OSError as error:
        raise CaptureError(f"nothing can be delivered here: {error.strerror}") from None
    params.extra_args = {**params.extra_args, MARK: mark}


def delivery_of(params: Any) -> Delivery | None:
    """The delivery of this process that sampling parameters are of, if any."""
    mark = (getattr(params, "extra_args", None) or {}).get(MARK)
    return _here.get(mark) if isinstance(mark, str) else None


def is_of_this_request(params: Any) -> bool:
    """Whether the delivery that sampling parameters name is that of the HTTP request being answered."""
    delivery, asked = delivery_of(params), _asked.get()
    return delivery is not None and (asked is None or asked.delivery is delivery)


def find_delivery(public_id: str, token: str) -> Json | None:
    """What is known of a request that this token opens; None where it opens none of that id."""
    try:
        path = _path_of(public_id)
        document = {} if _is_over(path) else _read(path) or {}
    except OSError:
        document = {}
    # The same work whether there is one or not.
    right = hmac.compare_digest(str(document.get("token", "")), _digest(token))
    return document if right and document.get("id") == public_id else None


def being_answered(document: Json) -> asyncio.Event | None:
    """What is set when the answer to a request is over; None where this process does not answer it."""
    found = (each for each in _here.values() if each.public_id == document["id"])
    return next((each.over for each in found), None)


def _read(path: Path) -> Json | None:
    try:
        document: Json = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return document


def _is_over(path: Path) -> bool:
    """Whether a request can be fetched no more, an hour after its answer or, without one, its beginning."""
    try:
        return path.stat().st_mtime < time.time() - _KEPT_S
    except OSError:
        return True


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _path_of(public_id: str) -> Path:
    name = hashlib.sha256(public_id.encode("utf-8", "surrogatepass")).hexdigest()
    return Path(shared_directory(), name + _SUFFIX)


_made = 0


def _forget_some() -> None:
    """Remove old deliveries now and then: looking at all of them keeps the server from answering."""
    global _made
    if _made % _LOOK_EVERY == 0:
        _forget_old()
    _made += 1


def _forget_old() -> None:
    """Remove deliveries that are older than an hour, and the oldest of very many."""
    with contextlib.suppress(OSError):
        ages = sorted(_ages(), reverse=True)
        limit = time.time() - _KEPT_S
        for _, path in ages[_MOST_KEPT - 1 :] + [each for each in ages if each[0] < limit]:
            path.unlink(missing_ok=True)


def _ages() -> Iterator[tuple[float, Path]]:
    for entry in os.scandir(shared_directory()):
        if entry.name.endswith(_SUFFIX):
            with contextlib.suppress(OSError):
                yield entry.stat().st_mtime, Path(entry.path)
