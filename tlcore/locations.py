"""Where things lie: paths and URLs, the same for whoever asks, and without their secrets."""

from __future__ import annotations

import os
import re

REDACTED = "***"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL (``s3://bucket/prefix``) and not a path of this machine."""
    return _URL.match(text) is not None


def redact_url(text: str) -> str:
    """A URL without user name, password, query and fragment; anything else as it is."""
    if not is_url(text):
        return text
    scheme, _, rest = text.partition("://")
    user, at, place = rest.rpartition("@")
    # A password may hold a "/"; an "@" in a path after no ":" and a "/" is part of a name.
    shown = f"{scheme}://{REDACTED}@{place}" if at and (":" in user or "/" not in user) else text
    clean = re.split(r"[?#]", shown, maxsplit=1)[0]
    return clean if clean == shown else f"{clean}?{REDACTED}"


def absolute_location(directory: str) -> str:
    """A path or URL as one that means the same whatever the working directory is later."""
    if is_url(directory):
        return directory.rstrip("/")
    return os.path.abspath(os.path.expanduser(directory)).rstrip("/")
