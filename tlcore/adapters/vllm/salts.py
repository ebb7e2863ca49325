"""The cache salt of a request into which results are injected: no other request reads what it caches."""

from __future__ import annotations

import re
import secrets
from typing import Any

_BEGIN = "tlcore-injected:"
_MADE = re.compile(rf"{_BEGIN}[0-9a-f]{{32}}:")


def keep_apart(request: Any) -> None:
    """Let an engine's new request share no prefix cache, neither read nor written, with any other.

    Without reading it computes its whole prompt, of which every position can be injected.
    """
    request.cache_salt = f"{_BEGIN}{secrets.token_hex(16)}:{request.cache_salt or ''}"
    for params in (request.sampling_params, request.pooling_params):
        # Whoever asked for several samples gets requests of one salt.
        if hasattr(params, "skip_reading_prefix_cache"):
            params.skip_reading_prefix_cache = True


def is_apart(salt: str | None) -> bool:
    """Whether `keep_apart` has made a salt."""
    return salt is not None and _MADE.match(salt) is not None


def given_salt(salt: str | None) -> str | None:
    """The salt that the client gave, if any."""
    made = None if salt is None else _MADE.match(salt)
    return salt if salt is None or made is None else salt[made.end() :] or None
