"""JSON texts of structures: in one line, and in many."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcore.layout import templates
from tlcore.layout.templates import compact, readable

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(DOCUMENTS)
def test_texts_are_what_json_makes(document: Any) -> None:
    assert compact(document) == json.dumps(document, separators=(",", ":"))
    assert readable(document) == json.dumps(document, indent=1) + "\n"


@pytest.mark.parametrize("length", [1, 600])
def test_little_is_kept_however_many_forms_there_are(length: int) -> None:
    for number in range(300):
        document = [[number, "text"]] * length
        assert readable(document) == json.dumps(document, indent=1) + "\n"
    assert len(templates._indented) <= 256
    assert max(map(len, templates._indented)) <= 512
