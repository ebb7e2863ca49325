"""Requests whose clients fetch what was captured of them: each has a token that its answer alone carries.

A server's API key is often shared, so what opens a request is a random token, of which only a hash is kept,
in files of the directory that a front end's processes share: another API server may be asked later.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
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


class TakenError(CaptureError):
    """Another request that can be fetched has the same id."""


class Delivery:
    """One HTTP request whose client fetches it: ``items`` are its prompts' requests in the engine.

    ``answered`` is whether the answer is complete.
    """

    def __init__(self, public_id: str, path: Path, token: str) -> None:
        self.public_id = public_id
        self.mark = secrets.token_hex(8)
        self._path = path
        self._document: Json = {
            "id": public_id,
            "token": _digest(token),
            "answered": False,
            "items": {},
        }

    def add(self, request_id: str, external_id: str, samples: int) -> None:
        """A prompt's request is admitted, under the id that the engine knows it by."""
        rest = external_id.removeprefix(f"{self.public_id}-")
        place = rest if rest.isdigit() else str(len(self._document["items"]))
        self._document["items"][place] = [request_id, samples]
        self._write()

    def answer_is_complete(self) -> None:
        """Nothing more comes."""
        self._document["answered"] = True
        self._write()

    def drop(self) -> None:
        """There was no answer, so nobody has the token."""
        self._path.unlink(missing_ok=True)

    def begin(self) -> None:
        """Take the id. Raises TakenError."""
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            raise TakenError(f"a request with the id {self.public_id!r} can be fetched already") from None
        self._write()

    def _write(self) -> None:
        part = self._path.with_suffix(f".{os.getpid()}.part")
        with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
            json.dump(self._document, file)
        part.rename(self._path)


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
                problem = "only answers of completions and chat can be fetched."
                raise choice_error(("deliver",), problem, "Leave it out.")
            token = secrets.token_urlsafe(32)
            made = Delivery(public_id, _path_of(public_id), token)
            _forget_old(made)
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
        asked, good = Asked(scope), False

        async def send_with_token(message: Any) -> None:
            nonlocal good
            if message["type"] == "http.response.start" and asked.token is not None:
                good = message["status"] == 200
                if good:
                    header = (HEADER.lower().encode(), asked.token.encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        before = _asked.set(asked)
        try:
            await self._app(scope, receive, send_with_token)
        finally:
            _asked.reset(before)
            _end(asked.delivery, good)


def _end(delivery: Delivery | None, good: bool) -> None:
    if delivery is not None:
        _here.pop(delivery.mark, None)
        with contextlib.suppress(OSError):
            if good:
                delivery.answer_is_complete()
            else:
                delivery.drop()


def mark_delivery(params: Any) -> None:
    """Let sampling parameters say which delivery they are of. Raises ConfigError, TakenError."""
    asked = _asked.get()
    if asked is None:
        problem = "only a server with the plugin tlcore.endpoint and an API key delivers."
        raise choice_error(("deliver",), problem, "In Python, attached.request(id) gives the same.")
    try:
        mark = asked.deliver().mark
    except OSError as error:
        raise CaptureError(f"nothing can be delivered: {error.strerror}") from None
    params.extra_args = {**params.extra_args, MARK: mark}


def delivery_of(params: Any) -> Delivery | None:
    """The delivery of this process that sampling parameters are of, if any."""
    mark = (getattr(params, "extra_args", None) or {}).get(MARK)
    return _here.get(mark) if isinstance(mark, str) else None


def find_delivery(public_id: str, token: str) -> Json | None:
    """What is known of a request that this token opens; None where it opens none of that id."""
    try:
        document: Json = json.loads(_path_of(public_id).read_text())
    except (OSError, ValueError):
        document = {}
    # The same work whether there is one or not.
    right = hmac.compare_digest(str(document.get("token", "")), _digest(token))
    return document if right and document.get("id") == public_id else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _path_of(public_id: str) -> Path:
    name = hashlib.sha256(public_id.encode("utf-8", "surrogatepass")).hexdigest()
    return Path(shared_directory(), name + _SUFFIX)


def _forget_old(made: Delivery) -> None:
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
