"""Calls of a remote filesystem: each under a deadline of our own, all under one retry policy."""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import re
import time
from collections.abc import Iterator
from typing import Any

from tlcore.storage import RetryPolicy

from .filesystems import FileSystem
from .threads import in_thread

# A transfer this slow is as good as none.
_SLOWEST_BYTES_PER_S = 1e6
_MARK = "__tlcore__"
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# obstore tells the status in its text alone.
_STATUS_IN_TEXT = re.compile(r"Server returned non-2xx status code: (\d{3})")
_PERMANENT = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    PermissionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)


class DeadlineError(TimeoutError):
    """The server did not answer in time."""


class RemoteCalls:
    """Runs methods of one filesystem; safe to use from several threads at once.

    A call gets `RetryPolicy.deadline_s` seconds and one more for each megabyte it moves. What may pass (no
    answer, no connection, a busy server) is tried `RetryPolicy.attempts` times with growing, random pauses.
    """

    def __init__(self, filesystem: FileSystem, retries: RetryPolicy) -> None:
        self._filesystem = filesystem
        self._deadline_s = retries.deadline_s
        self._attempts = retries.attempts
        if filesystem.async_impl:
            _let_connections_die_quietly(filesystem.loop)

    def run(self, method: str, *args: Any, moved_bytes: int = 0, **keys: Any) -> Any:
        """The method's result. Raises what the last attempt raised, or DeadlineError."""
        deadline_s = self._deadline_s + moved_bytes / _SLOWEST_BYTES_PER_S
        for attempt in range(1, self._attempts + 1):
            try:
                return self._once(method, args, keys, deadline_s)
            except Exception as error:
                if attempt == self._attempts or not is_transient(error):
                    raise
            time.sleep(random.uniform(0.5, 1.0) * min(_FIRST_PAUSE_S * 3**attempt, _LONGEST_PAUSE_S))
        raise ValueError("attempts must be 1 or more")

    def _once(self, method: str, args: tuple[Any, ...], keys: dict[str, Any], deadline_s: float) -> Any:
        if self._filesystem.async_impl:
            coroutine = getattr(self._filesystem, f"_{method}")(*args, **keys)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._filesystem.loop)
        else:
            future = in_thread(lambda: getattr(self._filesystem, method)(*args, **keys))
        try:
            return future.result(deadline_s)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            if future.done() and not future.cancelled():
                raise
            future.cancel()
            raise DeadlineError(f"no answer within {deadline_s:.1f} s") from None


def _let_connections_die_quietly(loop: asyncio.AbstractEventLoop) -> None:
    """Keep a library's own tasks from logging a traceback for each cut connection.

    The request that used the connection fails with an error of its own, which is told once.
    """
    previous = loop.get_exception_handler()
    if getattr(previous, _MARK, False):
        return

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), ConnectionError):
            return
        if previous is not None:
            previous(loop, context)
        else:
            loop.default_exception_handler(context)

    setattr(handle, _MARK, True)
    loop.set_exception_handler(handle)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    statuses = [status for cause in _causes(error) if (status := _status(cause)) is not None]
    if statuses:
        return statuses[0] in _TRANSIENT_STATUS
    if isinstance(error, _PERMANENT):
        return False
    return not is_about_credentials(error)


def is_about_credentials(error: BaseException) -> bool:
    """Whether the caller is unknown to the server or may not do what it asked for."""
    return isinstance(error, PermissionError) or any(
        _status(cause) in (401, 403) or re.search("credential|auth", type(cause).__name__, re.IGNORECASE)
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception of s3fs, gcsfs, adlfs, aiohttp or obstore carries."""
    if match := _STATUS_IN_TEXT.search(str(error)):
        return int(match[1])
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for name in ("status_code", "status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None
