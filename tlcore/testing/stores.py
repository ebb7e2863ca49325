"""Stores for tests: one in memory, one that is slow, one that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from ..errors import BackendError
from ..protocols import Buffer, Entry, Store


class MemoryStore:
    """Blobs in a dictionary."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """A name for messages; there is nothing to open behind it."""
        return "memory-store://"

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Keep the concatenation of ``parts``."""
        data = b"".join(parts)
        with self._lock:
            self.blobs[_checked(name)] = data
        return len(data)

    def copy(self, source: str, target: str) -> None:
        """Give the same bytes a second name."""
        self.put(target, [self.get(source)])

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a blob."""
        with self._lock:
            if _checked(name) not in self.blobs:
                raise FileNotFoundError(name)
            return self.blobs[name][start:end]

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All blobs whose name starts with ``prefix``."""
        with self._lock:
            found = [Entry(name, len(data)) for name, data in self.blobs.items() if name.startswith(prefix)]
        yield from found

    def delete(self, name: str) -> None:
        """Forget a blob."""
        with self._lock:
            self.blobs.pop(_checked(name), None)

    def close(self) -> None:
        """The blobs stay, so that a test can look at them."""


class _Wrapper:
    """A store that does something of its own before each call of another store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        """The other store's."""
        return self.store.url

    def before(self, method: str, name: str) -> None:
        """What happens before ``method`` is called on ``name``."""

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """As the other store does."""
        self.before("put", name)
        return self.store.put(name, parts)

    def copy(self, source: str, target: str) -> None:
        """As the other store does."""
        self.before("copy", target)
        self.store.copy(source, target)

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """As the other store does."""
        self.before("get", name)
        return self.store.get(name, start, end)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """As the other store does."""
        self.before("list", prefix)
        return self.store.list(prefix)

    def delete(self, name: str) -> None:
        """As the other store does."""
        self.before("delete", name)
        self.store.delete(name)

    def close(self) -> None:
        """As the other store does."""
        self.store.close()


class SlowStore(_Wrapper):
    """Waits ``delay_s`` seconds before each call of another store."""

    def __init__(self, store: Store, delay_s: float) -> None:
        super().__init__(store)
        self.delay_s = delay_s

    def before(self, method: str, name: str) -> None:
        """Wait."""
        time.sleep(self.delay_s)


class FailingStore(_Wrapper):
    """Raises BackendError instead of each ``put``, ``copy`` and so on named in ``methods``.

    ``failures`` limits how often it does; `calls` counts every call, the failed ones too.
    """

    def __init__(self, store: Store, methods: Sequence[str] = ("put",), failures: int | None = None) -> None:
        super().__init__(store)
        self.methods = frozenset(methods)
        self.failures_left = failures
        self.calls = 0
        self._lock = threading.Lock()

    def before(self, method: str, name: str) -> None:
        """Fail, if it is still time to."""
        with self._lock:
            self.calls += 1
            if method not in self.methods or self.failures_left == 0:
                return
            if self.failures_left is not None:
                self.failures_left -= 1
        raise BackendError(f"{self.url}: {method} of {name!r} fails on purpose")


def _checked(name: str) -> str:
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise BackendError(f"{name!r} is not a valid name: it must be a relative path without '..'")
    return name
