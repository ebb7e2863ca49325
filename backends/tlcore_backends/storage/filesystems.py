"""The fsspec filesystem for a URL: its package, its options, its own retries turned down."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import fsspec

from tlcore.errors import BackendError

from .obstore_options import obstore_options
from .redaction import Redactor
from .s3_sessions import share_descriptions

_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure"),
}


class FileSystem(Protocol):
    """What is used of an fsspec filesystem; those with ``async_impl`` have ``_find`` for ``find`` etc."""

    async_impl: bool

    @property
    def loop(self) -> Any:
        """The event loop that an ``async_impl`` filesystem runs on."""
        ...

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget listings."""
        ...


def open_filesystem(
    url: str, storage_options: Mapping[str, Any], redactor: Redactor
) -> tuple[FileSystem, str]:
    """A filesystem of our own (never shared) for ``url``, and the root's path in it.

    Raises BackendError for an unknown protocol, a missing package, or options that it does not take.
    """
    protocol = url.partition("://")[0].lower()
    if protocol == "s3" and (fast := obstore_options(storage_options)) is not None:
        return _obstore_filesystem(url, fast, redactor)
    kind = _filesystem_class(protocol, redactor.url)
    try:
        options = {**kind._get_kwargs_from_urls(url), **_adjusted(protocol, storage_options)}
        filesystem = kind(**options, skip_instance_cache=True, use_listings_cache=False)
        root = str(kind._strip_protocol(url)).rstrip("/")
    except ImportError as error:
        raise _missing_package(protocol, redactor.url, redactor.clean(str(error))) from None
    except Exception as error:
        reason = redactor.clean(f"{type(error).__name__}: {error}")
        raise BackendError(
            f"{redactor.url}: cannot be opened with these storage_options ({reason})"
        ) from None
    _check_root(root, redactor)
    if protocol in ("s3", "s3a"):
        # Calls that fail are tried again by RemoteCalls, under one policy for every protocol.
        filesystem.retries = 1
        share_descriptions(filesystem)
    return filesystem, root


def _obstore_filesystem(url: str, options: dict[str, Any], redactor: Redactor) -> tuple[FileSystem, str]:
    from .obstore_filesystem import BucketFilesystem

    root = url.partition("://")[2].rstrip("/")
    _check_root(root, redactor)
    # fsspec takes one argument away from what is called.
    kind: Any = BucketFilesystem
    return kind(root.partition("/")[0], options, skip_instance_cache=True), root


def _check_root(root: str, redactor: Redactor) -> None:
    if not root.strip("/"):
        raise BackendError(f"{redactor.url}: names no bucket or directory")


def _filesystem_class(protocol: str, shown: str) -> Any:
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise _missing_package(protocol, shown, str(error)) from None
    except ValueError:
        raise BackendError(
            f"{shown}: unknown protocol {protocol!r}; use s3://, gs://, az:// or another that fsspec knows"
        ) from None


def _missing_package(protocol: str, shown: str, reason: str) -> BackendError:
    extra = _EXTRAS.get(protocol)
    advice = f"pip install 'tlcore[{extra}]'" if extra else reason
    return BackendError(f"{shown}: a package for {protocol}:// is missing: {advice}")


def _adjusted(protocol: str, storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as given, save that s3's own retries and long connection attempts are turned down."""
    options: dict[str, Any] = copy.deepcopy(dict(storage_options))
    if protocol in ("s3", "s3a"):
        config = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10}
        options["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
    return options
