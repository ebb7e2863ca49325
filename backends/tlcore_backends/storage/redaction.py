"""Keeping credentials out of every message about a remote place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from tlcore.locations import REDACTED, redact_url

_PUBLIC_OPTIONS = re.compile(r".*(endpoint|region|url|host|project|account_name|location).*", re.IGNORECASE)
_SHORTEST_SECRET = 4
_LONGEST_ANSWER = 300
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>]+")
_SIGNED = re.compile(r"(?i)\b(sig|signature|token|password|secret|accountkey|x-amz-[a-z-]+)=[^&\s;'\"]+")


class Redactor:
    """Cleans texts that may quote the credentials in ``url`` or ``storage_options``."""

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.url = redact_url(url)
        self._secrets = sorted({*_in_url(url), *_in_options(storage_options)}, key=len, reverse=True)

    def clean(self, text: str) -> str:
        """The first line of ``text``, cut to 300 characters, without any secret."""
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        text = _URL_IN_TEXT.sub(lambda match: redact_url(match[0]), text)
        text = _SIGNED.sub(rf"\1={REDACTED}", text)
        line = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return line if len(line) <= _LONGEST_ANSWER else line[: _LONGEST_ANSWER - 3] + "..."


def _in_url(url: str) -> Iterator[str]:
    parts = urlsplit(url)
    userinfo = parts.netloc.rpartition("@")[0]
    # In abfs://container@account the part before @ is no secret; a password has a colon before it.
    if ":" in userinfo:
        yield from _forms(userinfo.partition(":")[2])
    for pair in parts.query.split("&"):
        yield from _forms(pair.partition("=")[2])


def _in_options(options: Any, key: str = "") -> Iterator[str]:
    if isinstance(options, Mapping):
        for name, value in options.items():
            yield from _in_options(value, str(name))
    elif isinstance(options, (list, tuple)):
        for value in options:
            yield from _in_options(value, key)
    elif isinstance(options, str) and not _PUBLIC_OPTIONS.fullmatch(key):
        yield from _forms(options)
        for part in options.split(";"):
            # A connection string also names its public endpoint.
            name, _, value = part.partition("=")
            if value and not _PUBLIC_OPTIONS.fullmatch(name) and name.lower() != "accountname":
                yield from _forms(value)
    elif isinstance(options, str):
        yield from _in_url(options)


def _forms(secret: str) -> Iterator[str]:
    """A secret as it is and percent-encoded; too short ones would blank out ordinary words."""
    if len(secret) >= _SHORTEST_SECRET:
        yield secret
        yield quote(secret, safe="")
