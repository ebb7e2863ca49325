"""The checksum of a JSON document: a line of its own at the beginning, told of all that stands behind it.

Documents of earlier versions have none, and such as other programs have written anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import xxhash

from ..errors import ReadError
from .hashes import HASH_PREFIX

KEY = "checksum"
_HASH = HASH_PREFIX.encode() + b"?" * 32
# In one line, or with one key a line.
_LINES = (
    b'{"checksum":"' + _HASH + b'",\n',
    b'{\n "checksum": "' + _HASH + b'",\n',
)
_LINE = re.compile(b"|".join(re.escape(line).replace(rb"\?" * 32, b"([0-9a-f]{32})") for line in _LINES))
# So many other bytes in such a line are damage; what differs in more is another line.
_DAMAGED_BYTES = 4


def with_checksum(text: str) -> bytes:
    """A JSON object that is not empty, in one line or with one key a line, with its checksum."""
    begin, colon = ("{\n ", ": ") if text.startswith("{\n ") else ("{", ":")
    rest = text[len(begin.rstrip(" ")) :].encode("utf-8")
    return f'{begin}"{KEY}"{colon}"{digest(rest)}",\n'.encode("ascii") + rest


def is_sound(data: bytes) -> bool | None:
    """Whether a document is as it was written; None for one without a checksum."""
    line = _LINE.match(data)
    if line is None:
        return False if any(_others(data, each) <= _DAMAGED_BYTES for each in _LINES) else None
    stated = line[1] or line[2]
    return digest(memoryview(data)[line.end() :]) == f"{HASH_PREFIX}{stated.decode('ascii')}"


def _others(data: bytes, line: bytes) -> int:
    """How many bytes at the beginning are not those of a line, whatever its digits."""
    differ = sum(one != other and other != _HASH[-1] for one, other in zip(data, line, strict=False))
    return differ + max(0, len(line) - len(data))


def has_checksum(data: bytes, where: str) -> bool:
    """Whether a document, found at ``where``, has a checksum. Raises ReadError where that is another's."""
    sound = is_sound(data)
    if sound is False:
        raise ReadError(f"{where}: damaged, it was changed since its checksum was written into it")
    return sound is True


def without_checksum(document: Any) -> Any:
    """A document that was parsed, as it was before it got its checksum."""
    if isinstance(document, dict):
        document.pop(KEY, None)
    return document


def digest_of_files(files: Mapping[str, bytes]) -> str:
    """The XXH3-128 of files, one after the other in the order of their names."""
    return digest(b"".join(files[name] for name in sorted(files)))


def digest(data: bytes | memoryview) -> str:
    """The XXH3-128 of bytes, as it is written."""
    return f"{HASH_PREFIX}{xxhash.xxh3_128_hexdigest(data)}"
