"""Nothing lost while a place cannot be written: blobs wait in a local directory and are delivered later."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

from tlcore.errors import BackendError, shareable
from tlcore.layout.run_files import RUN_FILE
from tlcore.protocols import Buffer, Entry, Store
from tlcore.record import RunInfo, SpillLocation

from ..directories import check_can_be_made
from ..local import LocalStore
from ..threads import in_thread
from .delivery import COPY, deliver, marker_name, remove_empty_directories

log = logging.getLogger("tlcore")

# A blob that travels faster than this is never too slow.
_FAST_BYTES_PER_S = 50e6
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_LAST_TRY_S = 10.0
_PROBE = RUN_FILE


class SpillStore:
    """A store before another one: what that refuses, or does not take in time, goes to a local directory.

    From the first such blob on all blobs go there, and one thread delivers them until none is left; then
    they go straight to the other store again. A copy whose source is not in the directory is kept as a
    note. The first ``run.json`` is the exception: it is the probe of the place, and must succeed.
    """

    def __init__(self, store: Store, run: RunInfo, place: SpillLocation) -> None:
        self._store = store
        self._place = place
        self._fsync = run.fsync
        self._kept = LocalStore(place.directory, run.fsync)
        self._rank = run.rank
        self._run_document: bytes | None = None
        # Blobs in the directory, each with a number that changes whenever it is written again.
        self._pending: dict[str, int] = {}
        self._writing: set[str] = set()
        self._version = 0
        # Calls of put and copy that have not returned.
        self._under_way = 0
        self._spilling = False
        self._used = False
        self._closing = False
        self._problem = ""
        self._changed = threading.Condition()
        # Set and cleared under the lock: whoever finds it set can rely on it to deliver.
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The other store's."""
        return self._store.url

    @property
    def waiting(self) -> str | None:
        """What has not been delivered yet, and why, in words; None when everything is there."""
        with self._changed:
            if not self._pending:
                return None
            return f"{len(self._pending)} files wait in {self._kept.url}: {self._problem}"

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Publish the concatenation of ``parts``, there or here. Raises BackendError when neither works."""
        # A try that is given up may still read its bytes later, when the caller's memory has others.
        data = b"".join(parts)
        if name == _PROBE and self._run_document is None:
            check_can_be_made(self._kept.url, "spill_dir")
            size = self._store.put(name, [data])
            self._run_document = data
            return size
        with self._counted():
            if not self._done_there(lambda: self._store.put(name, [data]), len(data)):
                self._keep(name, lambda kept: kept.put(name, [data]))
        return len(data)

    def copy(self, source: str, target: str) -> None:
        """Make ``target`` the same blob as ``source``, there or here."""
        with self._counted():
            if self._done_there(lambda: self._store.copy(source, target), 0):
                return
            if not self._copied_here(source, target):
                self._keep(target + COPY, lambda kept: kept.put(target + COPY, [source.encode()]))

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of a blob, from the directory while it waits there."""
        try:
            return self._kept.get(name, start, end)
        except FileNotFoundError:
            return self._store.get(name, start, end)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All blobs, those that wait included; copies that wait as notes are left out."""
        kept = [entry for entry in self._kept.list(prefix) if not entry.name.endswith(COPY)]
        waiting = {entry.name: entry for entry in kept if entry.name in self._pending}
        yield from waiting.values()
        yield from (entry for entry in self._store.list(prefix) if entry.name not in waiting)

    def delete(self, name: str) -> None:
        """Remove a blob there and here."""
        with self._changed:
            for waiting in (name, name + COPY):
                self._pending.pop(waiting, None)
                self._kept.delete(waiting)
        self._store.delete(name)

    def close(self) -> None:
        """Try for up to 10 s to deliver what waits, and say what is left."""
        with self._changed:
            self._closing = True
            if self._spilling:
                self._start_delivery()
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(_LAST_TRY_S)
        with self._changed:
            left = len(self._pending)
        if left:
            self._release()
            log.warning(
                "%d files could not be delivered to %s and wait in %s; `tlcore push %s` delivers them: %s",
                left, self.url, self._kept.url, self._kept.url, self._problem or "no answer in time",
            )  # fmt: skip
        elif self._used:
            remove_empty_directories(self._kept.url)
        self._store.close()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Around a whole put or copy: until it returns it may still leave something to be delivered."""
        with self._changed:
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1

    def _done_there(self, call: Callable[[], object], nbytes: int) -> bool:
        """Whether the other store did it; if not, spilling has begun."""
        with self._changed:
            if self._spilling:
                self._start_delivery()
                return False
        patience_s = self._place.patience_s + nbytes / _FAST_BYTES_PER_S
        try:
            in_thread(call).result(patience_s)
        except concurrent.futures.TimeoutError:
            self._begin(f"no answer within {patience_s:.1f} s")
        except FileNotFoundError:
            # The source of a copy is gone, which no later try can mend.
            raise
        except Exception as error:
            self._begin(_told(error))
        else:
            return True
        return False

    def _begin(self, problem: str) -> None:
        with self._changed:
            if self._spilling:
                return
            try:
                self._write_notes()
            except BackendError as error:
                raise BackendError(f"{error}; and {self.url} cannot be written: {problem}") from None
            self._spilling = self._used = True
            self._problem = problem
            self._start_delivery()
        log.warning(
            "%s cannot be written now; until it can, everything goes to %s: %s",
            self.url, self._kept.url, problem,
        )  # fmt: skip

    def _start_delivery(self) -> None:
        """Start the thread unless it runs; the lock is held.

        Where no thread can be had now, the next blob that spills asks again, and so does `close`.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        thread = threading.Thread(target=self._deliver, name="tlcore-spill", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._problem = "no thread could be started to deliver them"
        else:
            self._thread = thread

    def _release(self) -> None:
        """Say in the directory that this process, which may live on, delivers nothing of it any more."""
        with contextlib.suppress(BackendError):
            self._write_marker({"url": self.url})

    def _write_marker(self, note: dict[str, object]) -> None:
        self._write_here(lambda kept: kept.put(marker_name(self._rank), [json.dumps(note).encode()]))

    def _write_notes(self) -> None:
        """Say in the directory where its blobs belong, and make it a run that can be read."""
        self._write_marker({"url": self.url, "host": socket.gethostname(), "pid": os.getpid()})
        document = self._run_document
        if document is not None:
            self._write_here(lambda kept: kept.put(_PROBE, [document]))

    def _write_here(self, write: Callable[[LocalStore], object]) -> None:
        """Write into the directory, also after somebody else has removed its empty directories."""
        try:
            write(self._kept)
        except BackendError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            # Another rank that closed, or `tlcore push`. A new store makes the directories again.
            self._kept = LocalStore(self._place.directory, self._fsync)
            write(self._kept)

    def _keep(self, name: str, write: Callable[[LocalStore], object]) -> None:
        with self._changed:
            self._version += 1
            before = self._pending.get(name)
            self._pending[name] = self._version
            self._writing.add(name)
        try:
            self._write_here(write)
        except BaseException:
            with self._changed:
                if before is None:
                    self._pending.pop(name, None)
                else:
                    # An earlier blob of this name waits as before.
                    self._pending[name] = before
            raise
        finally:
            with self._changed:
                self._writing.discard(name)

    def _copied_here(self, source: str, target: str) -> bool:
        """Make a copy in the directory; False where the source does not wait there."""
        with self._changed:
            if source not in self._pending or source in self._writing:
                return False
            try:
                self._write_here(lambda kept: kept.copy(source, target))
            except FileNotFoundError:
                # `tlcore push` has delivered it.
                return False
            self._version += 1
            self._pending[target] = self._version
            return True

    def _deliver(self) -> None:
        """The thread: deliver until nothing waits; after a failure pause, longer each time."""
        pause_s = _FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause_s)
                last = self._closing
            try:
                self._deliver_once()
            except Exception as error:
                self._problem = _told(error)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = 0.1
            if self._ended(last):
                return

    def _deliver_once(self) -> None:
        with self._changed:
            versions = {name: n for name, n in self._pending.items() if name not in self._writing}

        def delivered(name: str) -> None:
            with self._changed:
                if self._pending.get(name) == versions[name]:
                    del self._pending[name]
                    self._kept.delete(name)

        deliver(self._kept, self._store, versions, delivered)

    def _ended(self, last: bool) -> bool:
        """Whether the thread ends: nothing waits any more, or it was the ``last`` try.

        Decided under the lock: a blob that spills from now on starts another thread.
        """
        with self._changed:
            recovered = not self._pending and not self._under_way
            if recovered:
                self._spilling = False
                problem = self._remove_notes()
            if recovered or last:
                self._thread = None
        if not recovered:
            return last
        log.info("%s can be written again; everything that waited in %s is there", self.url, self._kept.url)
        if problem is not None:
            log.warning("files that were delivered are left in %s: %s", self._kept.url, problem)
        return True

    def _remove_notes(self) -> BackendError | None:
        notes = [marker_name(self._rank)]
        if self._run_document is not None:
            notes.append(_PROBE)
        try:
            for name in notes:
                self._kept.delete(name)
        except BackendError as error:
            return error
        return None


def _told(error: BaseException) -> str:
    """What may be logged of an error; a missing file is named by our own stores only."""
    return str(error) if isinstance(error, FileNotFoundError) else shareable(error)
