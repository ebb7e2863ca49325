"""Configurations, valid by the schema and mutated ones: the schema and the code agree on what is valid."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema
from jsonschema import Draft202012Validator

import tlcore_schemas
from tests.fuzz.settings import cases
from tlcore.config.configuration import check_config, load_config
from tlcore.config.patterns import parse_pattern
from tlcore.config.request import request_choice
from tlcore.config.validation import coerce
from tlcore.errors import ConfigError
from tlcore.layout.windows import window_of

pytestmark = pytest.mark.slow
SCHEMA = tlcore_schemas.load("config.v1")
OPTIONS = {name: tlcore_schemas.load(f"backend/{name}.v1") for name in ("pt", "safetensors", "fsspec")}
VALIDATOR = Draft202012Validator(SCHEMA)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PATTERNS = st.sampled_from(
    [
        r"layers\.0\.",
        "mlp:1",
        "(?:a|b):0",
        ".*",
        "[",
        "(",
        "a{2",
        r"\:3",
        "x:99999999999999999999",
        "(?P<n>x)",
    ]
)
URLS = st.sampled_from(
    ["s3://bucket/runs", "memory://x", "gs://b", "file:///tmp/x", "s3://", "s3:///", "/tmp/x", "x"]
)


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a schema allows. Objects are put together here: the library's own way is out of date."""
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    if schema.get("type") != "object":
        return from_schema(schema)
    known = {key: values(entry) for key, entry in schema.get("properties", {}).items()}
    if not known:
        return st.dictionaries(st.text(max_size=8), JSON, max_size=3)
    needed = {key: known.pop(key) for key in schema.get("required", ())}
    least = schema.get("minProperties", 0)
    return st.fixed_dictionaries(needed, optional=known).filter(lambda found: len(found) >= least)


def backends() -> st.SearchStrategy[Any]:
    """Names and objects; what a schema allows for options, and a few things that it does not."""
    named = st.sampled_from([*OPTIONS, "no-such", "no.such:thing", "math:pi"])
    described = [
        st.builds(lambda options, name=name: {**options, "name": name}, values(schema))
        for name, schema in OPTIONS.items()
    ]
    placed = st.builds(lambda url, rest: {"name": "fsspec", "url": url, **rest}, URLS, st.just({}))
    return named | st.one_of(described) | placed


def documents() -> st.SearchStrategy[dict[str, Any]]:
    """Documents that are valid by the schema, with real backends and patterns more often than by chance."""
    telling = {
        "backend": backends(),
        "module_call_match": PATTERNS | st.lists(PATTERNS, min_size=1, max_size=3),
        "output_dir": URLS,
        "ops": st.lists(PATTERNS, max_size=2),
        "inject": st.none()
        | st.fixed_dictionaries({"run": URLS, "modules": st.lists(PATTERNS, min_size=1, max_size=2)}),
    }
    rest = {key: values(value) for key, value in SCHEMA["properties"].items() if key not in telling}
    # What one key says of another is left to chance.
    return st.fixed_dictionaries({}, optional={**rest, **telling}).filter(is_valid)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A document with some keys, values or their insides replaced, added or left out."""
    document = draw(documents())
    for _ in range(draw(st.integers(1, 3))):
        key = draw(
            st.sampled_from([*SCHEMA["properties"], "output_dri", "capture", ""]) | st.text(max_size=6)
        )
        how = draw(st.sampled_from(["replace", "wrap", "drop", "text"]))
        if how == "drop":
            document.pop(key, None)
        elif how == "wrap":
            document[key] = [document.get(key)]
        elif how == "text":
            document[key] = json.dumps(document.get(key))
        else:
            document[key] = draw(JSON)
    return document


def is_valid(document: Any) -> bool:
    return bool(VALIDATOR.is_valid(document))


def sound_by_the_schemas(document: dict[str, Any]) -> bool:
    """What the JSON Schemas and the rules beyond them say: patterns compile, one place, that fits."""
    if not is_valid(document):
        return False
    patterns = document.get("module_call_match") or []
    injected = document.get("inject") or {"modules": []}
    chosen = [*document.get("ops", []), *injected["modules"]]
    try:
        for pattern in [*([patterns] if isinstance(patterns, str) else patterns), *chosen]:
            parse_pattern(pattern, "$")
        if document.get("rows", "all") != "last":
            window_of(document.get("rows", "all"))
    except ValueError:
        return False
    eager = [key for key in ("ops", "inject") if document.get(key)]
    if eager and document.get("compiled") == "taps":
        return False
    if document.get("delivery") and document.get("capture") in ("stats", "channels"):
        return False
    requests = document.get("request_ids") or []
    try:
        for pattern in [requests] if isinstance(requests, str) else requests:
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    given_backend = document.get("backend", "pt")
    options = dict(given_backend) if isinstance(given_backend, dict) else {"name": given_backend}
    name = options.pop("name")
    place = options.get("url", document.get("output_dir", "/tmp/vllm_intermediates"))
    if name not in OPTIONS:
        return False
    if "url" in options and document.get("output_dir", place).rstrip("/") != str(place).rstrip("/"):
        return False
    if next(Draft202012Validator(OPTIONS[name]).iter_errors(coerce(options, OPTIONS[name])), None):
        return False
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", place.rstrip("/") if "://" in place else place)
    if "://" in place and re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", place):
        return bool(is_url)
    return bool(name != "fsspec")


@given(documents())
@cases(150, 2500)
def test_what_the_schema_allows_is_accepted(document: dict[str, Any]) -> None:
    config, found = check_config(document)
    assert (config is not None) == (not found)
    if config is None:
        about = {re.split(r"[.\[]", error.path.removeprefix("$."))[0] for error in found}
        allowed = {"module_call_match", "request_ids", "backend", "output_dir", "ops", "inject", "rows"}
        # What two keys may not say together stands in no schema of one of them.
        assert about <= {*allowed, "delivery", "spill_dir"}, found
        # Which backends can spill stands in no schema.
        assert not sound_by_the_schemas(document) or about == {"spill_dir"}, (document, found)
        return
    assert sound_by_the_schemas(document), document
    agrees(config.to_json(redact=False), document)


def agrees(normal: dict[str, Any], document: Any) -> None:
    """The normal form is itself valid, loads to an equal configuration, and survives JSON."""
    VALIDATOR.validate(normal)
    again = load_config(json.dumps(normal))
    assert again == load_config(document)
    assert again.to_json(redact=False) == normal


@given(mutated())
@cases(150, 2500)
def test_mutated_configurations_are_valid_by_both_or_by_neither(document: Any) -> None:
    config, found = check_config(document)
    assert (config is not None) == (not found)
    if config is not None:
        agrees(config.to_json(redact=False), document)
    elif not VALIDATOR.is_valid(document):
        assert all(isinstance(error, ConfigError) and error.path.startswith("$") for error in found)
    else:
        assert not sound_by_the_schemas(document) or "spill_dir" in document, (document, found)
    if config is not None and not VALIDATOR.is_valid(document):
        # Only a text that reads as JSON, or a whole float, may be taken for what it says.
        assert VALIDATOR.is_valid(coerce(document, {"properties": SCHEMA["properties"], "type": "object"}))


@given(JSON | st.text(max_size=30) | st.binary(max_size=20) | st.just(object()))
@cases(60, 1000)
def test_anything_at_all_is_answered_with_an_error_of_ours(value: Any) -> None:
    config, found = check_config(value)
    assert (config is not None) == (not found)
    assert all(error.path.startswith("$") for error in found)


@given(JSON)
@cases(40, 500)
def test_any_json_text_is_answered_as_the_value_itself(value: Any) -> None:
    text = json.dumps(value)
    from_text, found = check_config(text)
    if isinstance(value, dict) and "NaN" not in text and "Infinity" not in text:
        assert (from_text, [str(error) for error in found]) == (
            check_config(value)[0],
            [str(error) for error in check_config(value)[1]],
        )
    else:
        assert from_text is None and found


REQUEST = tlcore_schemas.load("request.v1")
CHOICES = st.dictionaries(st.sampled_from([*REQUEST["properties"], "row", ""]), JSON, max_size=3)


@given(CHOICES | values(REQUEST))
@cases(150, 2500)
def test_what_requests_choose_is_read_or_refused_with_its_path(document: Any) -> None:
    sound = Draft202012Validator(REQUEST).is_valid(document)
    choice, error = None, None
    try:
        choice = request_choice(document)
    except ConfigError as caught:
        error = caught
    if error is not None:
        assert error.path.startswith("$.tlcore")
        # That a window holds nothing stands in no schema.
        assert not sound or error.path == "$.tlcore.rows"
    else:
        # Not to want anything delivered is to say nothing.
        assert (choice is None) == (coerce(document, REQUEST) in ({}, {"deliver": False}))
        assert sound or Draft202012Validator(REQUEST).is_valid(coerce(document, REQUEST))


@given(JSON | st.text(max_size=30) | st.binary(max_size=20) | st.just(object()))
@cases(60, 1000)
def test_whatever_a_request_gives_is_answered_with_an_error_of_ours(value: Any) -> None:
    with suppress(ConfigError):
        request_choice(value)
