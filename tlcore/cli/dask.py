"""A Dask cluster that does a command's work (``--dask ADDRESS``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BackendError

_TIMEOUT_S = 20


@contextmanager
def client_of(address: str | None) -> Iterator[Any]:
    """A client of the cluster at an address; None without one. Raises BackendError where there is none."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise BackendError("--dask needs distributed: pip install 'tlcore[dask]'") from error
    try:
        client = Client(address, timeout=_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BackendError(f"--dask: no Dask scheduler at {address!r} ({error})") from error
    try:
        yield client
    finally:
        client.close()
