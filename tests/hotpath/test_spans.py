"""What stands in base64 in an alike text: the C half and the Python half tell the same of any."""

from __future__ import annotations

import base64
import itertools
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import scaled
from tests.hotpath.halves import half_of, native
from tlcore.hotpath import spans

TWINS: dict[str, Callable[..., Any]] = {"decode_spans": spans._decode_spans}
half = half_of(TWINS)
Half = Callable[[str], Callable[..., Any]]
_LARGEST = 2**63 - 1


def packed(pairs: Sequence[tuple[int, int]]) -> bytes:
    """Spans as they are taken."""
    return b"".join(struct.pack("=qq", *pair) for pair in pairs)


def both(*args: Any) -> list[tuple[str, Any]]:
    """What each half returns or raises."""
    found: list[tuple[str, Any]] = []
    for function in (native().decode_spans, TWINS["decode_spans"]):
        try:
            found.append(("returned", function(*args)))
        except (ValueError, TypeError, BufferError) as error:
            found.append((type(error).__name__, None))
    return found


def text_of(pieces: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, list[tuple[int, int]]]:
    """Texts with what stands behind each in base64, and where that is."""
    text, places = b"", []
    for plain, content in pieces:
        text += plain
        digits = base64.b64encode(content)
        places.append((len(text), len(text) + len(digits)))
        text += digits
    return text, places


_PIECES = st.lists(st.tuples(st.binary(max_size=9), st.integers(0, 70)), max_size=9)


@given(_PIECES, st.binary(max_size=9), st.randoms(use_true_random=False))
def test_all_that_alike_texts_hold_is_told(
    forms: list[tuple[bytes, int]], end: bytes, chance: random.Random
) -> None:
    contents = [[chance.randbytes(size) for _, size in forms] for _ in range(2)]
    plain = [begin for begin, _ in forms]
    (text, places), (pattern, _) = (text_of(list(zip(plain, each, strict=True))) for each in contents)
    expected = [("returned", b"".join(contents[0]))] * 2
    assert both(text + end, pattern + end, packed(places)) == expected
    # Memory that does not begin where integers do.
    assert both(text + end, pattern + end, memoryview(b"x" + packed(places))[1:]) == expected


@settings(max_examples=scaled(300, 10_000))
@given(_PIECES, st.randoms(use_true_random=False))
def test_another_byte_anywhere_is_found_or_told(
    forms: list[tuple[bytes, int]], chance: random.Random
) -> None:
    pieces = [(plain, chance.randbytes(size)) for plain, size in forms]
    pattern, places = text_of([*pieces, (b"end", b"")])
    at = chance.randrange(len(pattern))
    changed = bytearray(pattern)
    changed[at] = chance.choice([ord("="), ord("A"), ord("\n"), changed[at] ^ 1 << chance.randrange(8)])
    found = both(bytes(changed), pattern, packed(places))
    assert found[0] == found[1] and found[0][0] == "returned"
    inside = any(begin <= at < end for begin, end in places)
    if bytes(changed) != pattern and not inside:
        assert found[0][1] is None
    if found[0][1] is not None:
        assert found[0][1] == b"".join(base64.b64decode(changed[b:e], validate=True) for b, e in places)


def test_digits_that_are_none_or_padded_otherwise_are_refused(half: Half) -> None:
    pattern, places = text_of([(b'"', bytes(16)), (b'","', bytes(17)), (b'","', bytes(18))])
    decode = half("decode_spans")
    assert decode(pattern, pattern, packed(places)) == bytes(51)
    wrong = (b"====", b"A===", b"AA=A", b"A\nAA")
    for (_, end), digits in itertools.product(places, wrong):
        assert decode(pattern[: end - 4] + digits + pattern[end:], pattern, packed(places)) is None
    (_, one), (_, two), (_, three) = places
    for end, digits in ((one, b"AAA="), (one, b"AAAA"), (two, b"AA=="), (two, b"AAAA"), (three, b"AAA=")):
        assert decode(pattern[: end - 4] + digits + pattern[end:], pattern, packed(places)) is None
    for other in (pattern + b" ", pattern[:-1], b""):
        assert decode(other, pattern, packed(places)) is None
    # Bits behind the last byte.
    for end, digits in ((one, b"AB=="), (one, b"AP=="), (two, b"AAB="), (two, b"AAD=")):
        assert decode(pattern[: end - 4] + digits + pattern[end:], pattern, packed(places)) is None
    # What in the pattern is none is none of such a text, either.
    assert decode(b"A===", b"A===", packed([(0, 4)])) is None


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 3)],
        [(4, 0)],
        [(-4, 0)],
        [(0, 12)],
        [(4, 8), (0, 4)],
        [(0, 8), (4, 8)],
        [(0, _LARGEST - 3)],
        [(-(2**63), 0)],
        [(_LARGEST - 3, _LARGEST - 3)],
        [(0, 4), (4, -(2**62))],
    ],
)
def test_hostile_spans_are_refused(half: Half, pairs: list[tuple[int, int]]) -> None:
    for text in (b"AAAAAAAA", b"other"):
        with pytest.raises(ValueError, match="is none of base64 behind"):
            half("decode_spans")(text, b"AAAAAAAA", packed(pairs))
        with pytest.raises(ValueError, match="64-bit"):
            half("decode_spans")(text, b"AAAAAAAA", packed(pairs)[:-1])


@given(
    st.binary(max_size=24),
    st.lists(st.tuples(st.integers(-5, 30), st.integers(-5, 30)), max_size=4),
    st.integers(0, 3),
)
def test_both_halves_refuse_the_same(pattern: bytes, pairs: list[tuple[int, int]], cut: int) -> None:
    raw = packed(pairs)
    found = both(pattern, pattern, raw[: len(raw) - cut])
    assert found[0] == found[1]
