"""`FsspecStore`: blobs wherever fsspec reaches, with our own deadline and retries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tlcore.errors import BackendError
from tlcore.storage import Buffer, Entry, Level, Location, RetryPolicy, Store

from .filesystems import open_filesystem
from .local import UNFINISHED, check_name
from .redaction import Redactor
from .retries import DeadlineError, RemoteCalls, is_about_credentials

# How much a blob of unknown size may hold when its deadline is worked out.
_UNKNOWN_BYTES = 512 << 20
# Larger blobs are sent by several requests.
_IN_REQUESTS = 16 << 20


def open_remote(location: Location) -> Store:
    """The store of a URL of any protocol that fsspec knows."""
    return FsspecStore(location.url, location.storage_options, location.retries)


class FsspecStore:
    """Blobs under ``url`` in any storage that fsspec reaches (``s3://``, ``gs://``, ``az://``, ...).

    A blob is published by one complete upload, in several parts when it is large; a filesystem that
    shows half-written files gets a ``.tmp`` name and a rename. ``retries`` is as in `RemoteCalls`. Raises
    BackendError for an unknown protocol, a missing package or unusable options.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        retries: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is frozen
    ) -> None:
        options = dict(storage_options or {})
        self._redactor = Redactor(url, options)
        self._filesystem, self._root = open_filesystem(url, options, self._redactor)
        self._calls = RemoteCalls(self._filesystem, retries)
        # Of obstore. The others want bytes, and hand out bytes: a copy of what may be half a gigabyte.
        self._has_buffers = hasattr(self._filesystem, "_cat_buffer")
        # Object stores and the memory filesystem show an upload only when it is whole.
        self._renames = not self._filesystem.async_impl and not url.startswith("memory:")

    @property
    def url(self) -> str:
        """The root's URL without credentials."""
        return self._redactor.url

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Upload the concatenation of ``parts`` as ``name``; returns its size in bytes."""
        place = self._place(name)
        size = sum(memoryview(part).nbytes for part in parts)
        data = self._body(parts, size)
        try:
            if self._renames:
                self._calls.run("makedirs", place.rpartition("/")[0], exist_ok=True)
                self._calls.run("pipe_file", place + UNFINISHED, data, moved_bytes=size)
                self._calls.run("mv", place + UNFINISHED, place)
            else:
                self._calls.run("pipe_file", place, data, moved_bytes=size)
        except FileNotFoundError as error:
            raise self._refused("write", name, error, "the bucket or container must exist") from None
        except Exception as error:
            raise self._refused("write", name, error) from None
        return size

    def copy(self, source: str, target: str) -> None:
        """Make ``target`` the same blob as ``source``, by the server's own copy where it has one."""
        origin, place = self._place(source), self._place(target)
        try:
            if self._renames:
                self._calls.run("makedirs", place.rpartition("/")[0], exist_ok=True)
            self._calls.run("cp_file", origin, place, moved_bytes=_UNKNOWN_BYTES)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}/{source}") from None
        except NotImplementedError:
            self.put(target, [self.get(source)])
        except Exception as error:
            raise self._refused("copy", target, error) from None

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a blob, by one ranged request."""
        if end is not None and end <= start:
            self._place(name)
            return b""
        moved = _UNKNOWN_BYTES if end is None else end - start
        limits = {} if start == 0 and end is None else {"start": start, "end": end}
        try:
            data: bytes = self._read(name, "cat_file", moved, limits)
        except NotImplementedError:
            # obstore wants both ends of a range.
            size = self._size(name)
            return self.get(name, start, size) if start < size else b""
        return data

    def get_buffer(self, name: str, start: int, end: int) -> memoryview:
        """The same as the client has them: obstore's need no copy."""
        method = "cat_buffer" if self._has_buffers else "cat_file"
        limits = {"start": start, "end": end}
        return memoryview(self._read(name, method, end - start, limits) if start < end else b"")

    def _read(self, name: str, method: str, moved: int, limits: Mapping[str, int | None]) -> Any:
        try:
            return self._calls.run(method, self._place(name), moved_bytes=moved, **limits)
        except NotImplementedError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}/{name}") from None
        except Exception as error:
            raise self._refused("read", name, error) from None

    def _size(self, name: str) -> int:
        try:
            return int(self._calls.run("info", self._place(name))["size"])
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}/{name}") from None
        except Exception as error:
            raise self._refused("read", name, error) from None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All blobs whose name starts with ``prefix``."""
        directory = prefix.rpartition("/")[0]
        start = self._place(directory) if directory else self._root
        self._filesystem.invalidate_cache()
        try:
            found: dict[str, Any] = self._calls.run("find", start, detail=True)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._refused("list", prefix, error) from None
        for path, info in found.items():
            name = path[len(self._root) + 1 :]
            if (
                path.startswith(f"{self._root}/")
                and name.startswith(prefix)
                and not name.endswith(UNFINISHED)
            ):
                yield Entry(name, int(info["size"]))

    def level(self, directory: str = "") -> Level:
        """What lies directly in a directory, by a listing with a delimiter."""
        start = self._place(directory) if directory else self._root
        self._filesystem.invalidate_cache()
        found = Level([], [])
        try:
            listed: list[dict[str, Any]] = self._calls.run("ls", start, detail=True)
        except FileNotFoundError:
            return found
        except Exception as error:
            raise self._refused("list", directory, error) from None
        for info in listed:
            path = str(info["name"]).rstrip("/")
            name = path[len(self._root) + 1 :]
            # Some list the directory itself, as a marker or as a file of its own name.
            if not path.startswith(f"{self._root}/") or name == directory:
                continue
            if info.get("type") == "directory":
                found.directories.append(name)
            elif not name.endswith(UNFINISHED):
                found.blobs.append(Entry(name, int(info["size"])))
        return found

    def delete(self, name: str) -> None:
        """Remove a blob; a missing one is not an error."""
        place = self._place(name)
        try:
            self._calls.run("rm_file", place)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._refused("delete", name, error) from None

    def close(self) -> None:
        """The connections end with the filesystem object, which nobody else has."""

    def _body(self, parts: Sequence[Buffer], size: int) -> Buffer | Sequence[Buffer]:
        if len(parts) == 1 and (self._has_buffers or isinstance(parts[0], bytes)):
            return parts[0]
        # What is sent by several requests is put together for each of them anyway.
        return list(parts) if self._has_buffers and size >= _IN_REQUESTS else b"".join(parts)

    def _place(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _refused(self, action: str, name: str, error: BaseException, advice: str = "") -> BackendError:
        if isinstance(error, BackendError):
            return error
        if is_about_credentials(error):
            advice = "check the credentials in storage_options and what they may do"
        answer = str(error) if isinstance(error, DeadlineError) else f"{type(error).__name__}: {error}"
        text = f"cannot {action} {self.url}/{name}: {self._redactor.clean(answer)}"
        return BackendError(f"{text} ({advice})" if advice else text)
