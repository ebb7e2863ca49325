"""Calls in threads: one that nobody has to wait for to its end, and many a few at a time."""

from __future__ import annotations

import concurrent.futures
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def in_thread(call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Run a call in a thread that is left behind when nobody waits for it any more."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            result = call()
        except BaseException as error:
            if not future.cancelled():
                future.set_exception(error)
        else:
            if not future.cancelled():
                future.set_result(result)

    threading.Thread(target=work, name="tlcore-remote", daemon=True).start()
    return future


def in_order(call: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
    """The result for each of ``items``, of which ``threads`` are on their way while one is used."""
    if threads < 2:
        yield from map(call, items)
        return
    waiting: deque[concurrent.futures.Future[_R]] = deque()
    pool = concurrent.futures.ThreadPoolExecutor(threads, "tlcore-read")
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
