"""A call that nobody has to wait for to its end."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


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
