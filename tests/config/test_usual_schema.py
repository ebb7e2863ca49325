"""What is accepted without `jsonschema` is what that accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import tlcore_schemas
from tlcore.config.usual_schema import is_certainly_valid, is_of_type

SCHEMAS: list[dict[str, Any]] = [
    json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(tlcore_schemas.__file__).parent.rglob("*.json"))
    if path.parent.name == "backend" or path.name in ("config.v1.json", "request.v1.json")
]
KEYS = sorted({key for schema in SCHEMAS for key in schema.get("properties", {})})
TEXTS = ["pt", "stats", "channels", "all", "last", "bfloat16", "int8", "", "a", "cuda:0", "warn", "block"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, 1.0, 2.5, *TEXTS])
    | st.text(max_size=4)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


def pieces(schema: Any) -> list[dict[str, Any]]:
    """A schema and all that is in it."""
    if isinstance(schema, list):
        return [piece for each in schema for piece in pieces(each)]
    if not isinstance(schema, dict):
        return []
    inner = [piece for key, each in schema.items() if key != "default" for piece in pieces(each)]
    return [schema, *inner] if all(isinstance(key, str) for key in schema) else inner


EVERY = [piece for schema in SCHEMAS for piece in pieces(schema) if not piece.keys() & set(KEYS)]


@given(st.sampled_from(EVERY), values)
def test_what_is_accepted_is_valid(schema: dict[str, Any], value: Any) -> None:
    valid = Draft202012Validator(schema).is_valid(value)
    assert valid or not is_certainly_valid(value, schema)


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=4))
def test_whole_configurations_are_told_alike(document: dict[str, Any]) -> None:
    for schema in SCHEMAS:
        assert is_certainly_valid(document, schema) == Draft202012Validator(schema).is_valid(document)


@given(values, st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"]))
def test_types_are_those_of_the_library(value: Any, name: str) -> None:
    assert is_of_type(value, name) == Draft202012Validator.TYPE_CHECKER.is_type(value, name)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {}},
        {"enum": [1]},
        {"const": True},
        {"type": "text"},
        {"items": True},
        {"if": {}, "else": {"type": "null"}},
        {"properties": {"a": {"$ref": "#"}}},
        {"additionalProperties": {"type": "null"}},
        {"pattern": "("},
        {"minLength": "1"},
    ],
)
def test_what_is_not_known_is_left_to_the_library(schema: dict[str, Any]) -> None:
    for value in (1, "a", {"a": 1}, [1], True):
        assert not is_certainly_valid(value, schema) or Draft202012Validator(schema).is_valid(value)


def test_a_right_configuration_does_not_load_the_library(tmp_path: Path) -> None:
    code = (
        "import sys; from tlcore.config.configuration import load_config;"
        " load_config(output_dir='a', log_step_ids='[1, 2]', capture='stats', module_call_match=['x'],"
        " backend={'name': 'safetensors', 'commit_s': 0}); assert 'jsonschema' not in sys.modules;"
        " sys.exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)
