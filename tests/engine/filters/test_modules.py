"""Patterns: which end in a call index, which do not, and how several unite."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcore.config.patterns import parse_pattern
from tlcore.engine.filters.modules import ModuleFilter
from tlcore.errors import ConfigError

NAMES = st.from_regex(r"[a-z]{1,5}(\.[a-z0-9_]{1,5}){0,3}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "regex", "call"),
    [
        ("layers", "layers", None),
        ("layers:0", "layers", 0),
        ("layers:12", "layers", 12),
        ("layers:007", "layers", 7),
        (":3", "", 3),
        ("", "", None),
        ("a:1:2", "a:1", 2),
        (r"a\:0", r"a\:0", None),
        (r"a\\:0", r"a\\", 0),
        (r"a\\\:0", r"a\\\:0", None),
        ("(?:a|b)", "(?:a|b)", None),
        ("(?:a|b):1", "(?:a|b)", 1),
        ("(?:0)", "(?:0)", None),
        ("a[:0]", "a[:0]", None),
        ("a[:0]:2", "a[:0]", 2),
        ("a:", "a:", None),
        ("a:-1", "a:-1", None),
        ("a:1 ", "a:1 ", None),
        ("a:1\n", "a:1\n", None),
        ("a:\N{ARABIC-INDIC DIGIT ONE}", "a:\N{ARABIC-INDIC DIGIT ONE}", None),
        (r"layers\.(?:0|1)\.:0", r"layers\.(?:0|1)\.", 0),
    ],
)
def test_call_index_is_exactly_a_trailing_unescaped_number(text: str, regex: str, call: int | None) -> None:
    compiled, index = parse_pattern(text)
    assert (compiled.pattern, index) == (regex, call)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("*a", "nothing to repeat at position 0"),
        ("a(b", "missing ), unterminated subpattern at position 1"),
        ("(?:0", "missing ), unterminated subpattern at position 0"),
        ("a[:0", "unterminated character set at position 1"),
        ("a(b:0", "missing ), unterminated subpattern at position 1"),
        ("a\\", "bad escape (end of pattern) at position 1"),
    ],
)
def test_bad_regex_says_what_and_where(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModuleFilter(["fine", text])
    assert caught.value.path == "$.module_call_match[1]"
    assert says in caught.value.problem
    assert repr(text) in caught.value.problem
    assert ('Any text is ".*"' in str(caught.value)) == (text[0] == "*")


@pytest.mark.parametrize("text", ["a{99999999999}", "(" * 5000 + ")" * 5000, "a:" + "9" * 5000])
def test_patterns_beyond_any_limit_are_config_errors(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\$\.module_call_match"):
        parse_pattern(text)


def test_no_patterns_select_nothing_and_none_selects_all() -> None:
    assert ModuleFilter(None).calls("anything") == "all"
    assert ModuleFilter([]).calls("anything") is None


def test_search_is_not_anchored() -> None:
    chosen = ModuleFilter([r"layers\.0\."])
    assert chosen.calls("model.layers.0.mlp") == "all"
    assert chosen.calls("model.layers.0") is None
    assert chosen.calls("model.layers.10.mlp") is None


def test_several_patterns_unite_and_all_wins() -> None:
    chosen = ModuleFilter(["rotary:0", "rotary:2", "rotary$:2", "norm:1", "norm"])
    assert chosen.calls("rotary") == frozenset({0, 2})
    assert chosen.calls("norm") == "all"
    assert ModuleFilter(["norm", "norm:1"]).calls("norm") == "all"
    assert chosen.calls("mlp") is None


@given(NAMES, st.integers(0, 10**6))
def test_an_escaped_name_with_an_index_selects_that_call_alone(name: str, call: int) -> None:
    assert ModuleFilter([f"^{re.escape(name)}$:{call}"]).calls(name) == frozenset({call})


@given(NAMES, st.integers(0, 999))
def test_a_name_that_ends_in_a_colon_and_number_is_matched_by_its_escape(name: str, call: int) -> None:
    odd = f"{name}:{call}"
    assert ModuleFilter([rf"^{re.escape(name)}\:{call}$"]).calls(odd) == "all"
    assert ModuleFilter([rf"^{re.escape(name)}\:{call}"]).calls(odd) == "all"


@given(NAMES, st.lists(st.tuples(NAMES, st.none() | st.integers(0, 5)), max_size=5))
def test_order_never_matters_and_the_union_is_of_the_parts(
    name: str, parts: list[tuple[str, int | None]]
) -> None:
    patterns = [re.escape(text) + ("" if call is None else f":{call}") for text, call in parts]
    together = ModuleFilter(patterns).calls(name)
    assert together == ModuleFilter(patterns[::-1]).calls(name)
    alone = [ModuleFilter([pattern]).calls(name) for pattern in patterns]
    if "all" in alone:
        assert together == "all"
    else:
        indices = {call for calls in alone if isinstance(calls, frozenset) for call in calls}
        assert together == (frozenset(indices) or None)


@given(st.text(max_size=20))
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    try:
        regex, call = parse_pattern(text)
    except ConfigError:
        return
    assert text.startswith(regex.pattern)
    assert (call is None) == (regex.pattern == text)
