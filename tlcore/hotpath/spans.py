"""What stands in base64 in a text of which all else is known."""

from __future__ import annotations

import re
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from typing import Any

from .native import extension

_DIGITS = re.compile(rb"[A-Za-z0-9+/]*")
_MOST_PADDING = 2


def _decode_spans(text: Any, pattern: Any, spans: Any) -> bytes | None:
    """What spans of a text hold in base64, one after the other.

    None where all else is not as in ``pattern``, or they are not as these bytes are written, padded as there.
    ``spans`` holds a begin and an end of each, as 64-bit integers that ascend. Raises ValueError for such as
    make no sense.
    """
    with memoryview(text).cast("B") as own, memoryview(pattern).cast("B") as other:
        data, known = bytes(own), bytes(other)
    with memoryview(spans).cast("B") as raw:
        if len(raw) % 16:
            raise ValueError("spans are pairs of 64-bit integers")
        pairs = list(struct.iter_unpack("=qq", raw))
    done = 0
    for number, (begin, end) in enumerate(pairs):
        if not done <= begin <= end <= len(known) or (end - begin) % 4:
            problem = f"[{begin}, {end}) is none of base64 behind {done} in {len(known)} bytes"
            raise ValueError(f"span {number}: {problem}")
        done = end
    if len(data) != len(known):
        return None
    found: list[bytes] = []
    done = 0
    for begin, end in pairs:
        wanted, piece = known[begin:end], data[begin:end]
        padding = min(len(wanted) - len(wanted.rstrip(b"=")), _MOST_PADDING)
        digits = piece[: len(piece) - padding]
        # Decoding would pass over what is no digit.
        if (
            data[done:begin] != known[done:begin]
            or piece[len(digits) :] != b"=" * padding
            or not _DIGITS.fullmatch(digits)
        ):
            return None
        content = a2b_base64(piece)
        if b2a_base64(content, newline=False) != piece:
            return None
        found.append(content)
        done = end
    return b"".join(found) if data[done:] == known[done:] else None


decode_spans: Callable[[Any, Any, Any], bytes | None] = extension.decode_spans if extension else _decode_spans
