"""The threads that read a data set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

_REMOTE_THREADS = 8
_LOCAL_THREADS = 2


class Threads:
    """Threads that read, made when they are needed, in each process anew."""

    def __init__(self, is_local: bool, count: int | None = None) -> None:
        self._count = count or (_LOCAL_THREADS if is_local else _REMOTE_THREADS)
        self._single = is_local and count is None
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()

    def changed(self) -> bool:
        """Whether this is another process than that of the threads."""
        return self._pid != os.getpid()

    def pool(self) -> Executor | None:
        """The threads; None where a local disk is faster without them."""
        return None if self._single else self.always()

    def always(self) -> Executor:
        """The threads."""
        if self._pool is None or self.changed():
            self._pool, self._pid = ThreadPoolExecutor(self._count, "tlcore-read"), os.getpid()
        return self._pool

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_pool": None}
