"""Removing runs, and what writers that died left unfinished."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from tlcore.errors import BackendError
from tlcore.layout.run_files import RUN_FILE
from tlcore.locations import redact_url
from tlcore.registry import open_store
from tlcore.storage import Store, SupportsRemoval, SupportsUsage

from .directories import walk
from .local import unfinished_files
from .redaction import Redactor
from .spill.delivery import STEP_END
from .uploads import Uploads


@dataclass(frozen=True, slots=True)
class Leftover:
    """An upload or a file that somebody began and never finished; `remove` ends it."""

    name: str
    begun: float
    bytes: int | None
    remove: Callable[[], None]


def remove_run(url: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove a run's files and directory.

    The ``step.json`` files go first and ``run.json`` last: a removal that is cut short leaves a run that
    says of itself that it is not whole. Raises BackendError as the place does.
    """
    store = open_store(url, storage_options)
    names = [entry.name for entry in store.list()]
    ends = [name for name in names if STEP_END.fullmatch(name)]
    rest = [name for name in names if not STEP_END.fullmatch(name) and name != RUN_FILE]
    for group in (ends, rest, [RUN_FILE]):
        _delete(store, group)
    if isinstance(store, SupportsRemoval):
        store.remove_root()
    store.close()


def stored_bytes(url: str, storage_options: Mapping[str, Any] | None = None) -> int:
    """How many bytes a run takes; hard links to one file count once."""
    store = open_store(url, storage_options)
    if isinstance(store, SupportsUsage):
        return store.usage()
    return sum(entry.size for entry in store.list())


def leftovers(
    url: str, storage_options: Mapping[str, Any] | None = None, older_than_s: float = 86400.0
) -> list[Leftover]:
    """Uploads in parts below an S3 URL, or unfinished files in the runs of a local directory.

    Only those begun more than ``older_than_s`` seconds ago: younger ones may be on their way. Other
    clouds end such uploads by themselves. Raises BackendError when the place cannot be listed.
    """
    scheme = url.partition("://")[0].lower() if "://" in url else "file"
    if scheme in ("s3", "s3a"):
        found = _s3_uploads(url, dict(storage_options or {}))
    elif scheme in ("file", "local"):
        found = _unfinished_files(unquote(urlsplit(url).path) if "://" in url else url)
    else:
        raise BackendError(f"{redact_url(url)}: unfinished uploads can be listed on S3 and local disks only")
    limit = time.time() - older_than_s
    return sorted((each for each in found if each.begun < limit), key=lambda each: each.begun)


def _delete(store: Store, names: list[str]) -> None:
    uploads = Uploads(store)
    try:
        for name in names:
            uploads.delete(name)
        uploads.wait()
    finally:
        uploads.close()


def _unfinished_files(directory: str) -> Iterator[Leftover]:
    for child in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if not child.is_dir(follow_symlinks=False) or not os.path.isfile(f"{child.path}/{RUN_FILE}"):
            continue
        for path in unfinished_files(child.path):
            status = os.lstat(path)
            below = [entry.stat(follow_symlinks=False).st_size for entry in walk(path)]
            size = sum(below) if stat.S_ISDIR(status.st_mode) else status.st_size
            yield Leftover(path, status.st_mtime, size, _Unlink(path))


@dataclass(frozen=True, slots=True)
class _Unlink:
    path: str

    def __call__(self) -> None:
        try:
            if os.path.isdir(self.path) and not os.path.islink(self.path):
                shutil.rmtree(self.path)
            else:
                os.unlink(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BackendError(f"cannot remove {self.path}: {error.strerror or error}") from error


def _s3_uploads(url: str, options: dict[str, Any]) -> Iterator[Leftover]:
    redactor = Redactor(url, options)
    try:
        filesystem: Any = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    except ImportError:
        raise BackendError(f"{redactor.url}: s3fs is missing: pip install 'tlcore[s3]'") from None
    bucket, _, prefix = str(filesystem._strip_protocol(url)).rstrip("/").partition("/")

    def ask(method: str, **keys: Any) -> Any:
        try:
            return filesystem.call_s3(method, Bucket=bucket, **keys)
        except Exception as error:
            reason = redactor.clean(f"{type(error).__name__}: {error}")
            raise BackendError(f"{redactor.url}: {method} failed: {reason}") from None

    marks: dict[str, str] = {}
    while True:
        page = ask("list_multipart_uploads", Prefix=f"{prefix}/" if prefix else "", **marks)
        for upload in page.get("Uploads", ()):
            begun: datetime = upload["Initiated"]
            target = {"Key": upload["Key"], "UploadId": upload["UploadId"]}

            def abort(target: Mapping[str, str] = target) -> None:
                ask("abort_multipart_upload", **target)

            yield Leftover(f"s3://{bucket}/{upload['Key']}", begun.timestamp(), None, abort)
        if not page.get("IsTruncated"):
            return
        marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
