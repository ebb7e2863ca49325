"""A document's checksum: told of every byte behind it, and missed by no damage of its own line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xxhash

from tlcore.errors import ReadError
from tlcore.layout.checksums import has_checksum, is_sound, with_checksum, without_checksum
from tlcore.layout.templates import compact, readable

DOCUMENT: dict[str, Any] = {"layout": 1, "name": "ä\n", "list": [1, {"a": None}]}
TEXTS = {"compact": compact(DOCUMENT) + "\n", "readable": readable(DOCUMENT)}


@pytest.mark.parametrize("form", TEXTS)
def test_the_rest_is_the_document_without_it(form: str) -> None:
    data = with_checksum(TEXTS[form])
    assert is_sound(data) is True and has_checksum(data, "here")
    found = json.loads(data)
    # As the page of the format says.
    line = data.index(b",\n") + 2
    assert found["checksum"] == f"xxh3-128:{xxhash.xxh3_128_hexdigest(data[line:])}"
    assert next(iter(found)) == "checksum"
    assert without_checksum(found) == DOCUMENT
    assert ("{" if form == "compact" else "{\n") + data[line:].decode() == TEXTS[form]


@pytest.mark.parametrize("form", TEXTS)
def test_every_other_byte_anywhere_is_damage(form: str) -> None:
    data = with_checksum(TEXTS[form])
    for place in range(len(data)):
        for value in range(256):
            if value != data[place]:
                changed = data[:place] + bytes([value]) + data[place + 1 :]
                assert is_sound(changed) is False
    for end in range(60, len(data)):
        assert is_sound(data[:end]) is False
    with pytest.raises(ReadError, match="here: damaged, it was changed since its checksum was written"):
        has_checksum(data[:-1], "here")


@pytest.mark.parametrize("form", TEXTS)
def test_a_document_without_one_has_none(form: str) -> None:
    assert is_sound(TEXTS[form].encode()) is None
    assert is_sound(b"") is None and is_sound(b"{}") is None
    # Another program has parsed it and written it anew.
    assert is_sound(json.dumps(json.loads(with_checksum(TEXTS[form]))).encode()) is None
