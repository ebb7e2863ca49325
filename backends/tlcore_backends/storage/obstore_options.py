"""Whether obstore's faster filesystem can stand in for s3fs, and its options if so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

_KNOWN = frozenset({"key", "secret", "token", "endpoint_url", "client_kwargs"})
_KNOWN_CLIENT = frozenset({"region_name", "endpoint_url"})
# Variables that change no request, since the region is given.
_HARMLESS = frozenset({"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PAGER", "AWS_EXECUTION_ENV"})
_HARMLESS_WITHOUT_TLS = frozenset({"AWS_CA_BUNDLE"})


def obstore_options(storage_options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of obstore's filesystem that mean what ``storage_options`` mean to s3fs.

    None where that is not certain: obstore reads no profiles and looks at other variables, so key, secret
    and region must be given, no ``AWS_`` variable may be set that means anything then, and no further option
    may be used.
    """
    client = storage_options.get("client_kwargs") or {}
    if not _KNOWN.issuperset(storage_options) or not _KNOWN_CLIENT.issuperset(client):
        return None
    needed = (storage_options.get("key"), storage_options.get("secret"), client.get("region_name"))
    endpoint = str(storage_options.get("endpoint_url") or client.get("endpoint_url") or "")
    if not all(needed) or _environment_matters(endpoint) or not find_spec("obstore"):
        return None
    config = dict(zip(("access_key_id", "secret_access_key", "region"), needed, strict=True))
    if endpoint:
        config["endpoint"] = endpoint
    if storage_options.get("token"):
        config["session_token"] = storage_options["token"]
    # Deadlines and retries are RemoteCalls' business; obstore would give up on a large part after 30 s.
    return {
        "config": config,
        "client_options": {
            "allow_http": endpoint.startswith("http://"),
            "timeout": "1h",
            "connect_timeout": "10s",
        },
        "retry_config": {"max_retries": 0},
    }


def _environment_matters(endpoint: str) -> bool:
    harmless = _HARMLESS | _HARMLESS_WITHOUT_TLS if endpoint.startswith("http://") else _HARMLESS
    return any(name.startswith("AWS_") and name not in harmless for name in os.environ)
