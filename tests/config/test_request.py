"""What a request says of its own capture: read, refused with the key's name, held against what is allowed."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import tlcore_schemas
from tlcore.config.configuration import load_config
from tlcore.config.request import Allowed, RequestChoice, request_choice, unknown_module
from tlcore.engine.filters.choosing import ModuleNames
from tlcore.errors import ConfigError
from tlcore.layout.windows import Window


def test_the_schema_is_one_and_has_the_keys_that_can_be_allowed() -> None:
    schema = tlcore_schemas.load("request.v1")
    Draft202012Validator.check_schema(schema)
    allowed = tlcore_schemas.load("config.v1")["properties"]["request_overrides"]["items"]["enum"]
    assert list(schema["properties"]) == [*allowed, "deliver"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"enabled": False}, RequestChoice(enabled=False)),
        ({"modules": ["a.*"], "rows": "last"}, RequestChoice(None, ("a.*",), "last")),
        ({"rows": {"from": -2}}, RequestChoice(rows=Window(-2))),
        ({"enabled": "true"}, RequestChoice(enabled=True)),
        ({"deliver": True}, RequestChoice(deliver=True)),
        ({"deliver": False}, None),
    ],
)
def test_a_choice_is_read_from_a_mapping_and_from_text(
    given: dict[str, Any], expected: RequestChoice | None
) -> None:
    assert request_choice(given) == request_choice(json.dumps(given)) == expected


@pytest.mark.parametrize(
    ("given", "path", "words"),
    [
        ({"row": "last"}, "$.tlcore.row", 'Did you mean "rows"?'),
        ({"rows": "lasst"}, "$.tlcore.rows", 'Did you mean "last"?'),
        ({"rows": {"from": 3, "to": 2}}, "$.tlcore.rows", "there is no position"),
        ({"modules": []}, "$.tlcore.modules", "1 to 64"),
        ({"modules": ["x"] * 65}, "$.tlcore.modules", "1 to 64"),
        ({"modules": ["x", "y" * 257]}, "$.tlcore.modules[1]", "256"),
        ({"modules": ["*." * 5 + "a"] * 13}, "$.tlcore.modules", "have 65 * together, more than 64"),
        ({"enabled": 1}, "$.tlcore.enabled", "true or false"),
        ({"enabled": float("nan")}, "$.tlcore.enabled", "finite"),
        ("{", "$.tlcore", "not valid JSON"),
        ('{"rows": "all", "rows": "last"}', "$.tlcore", "twice"),
        ("[" * 100_000, "$.tlcore", "longer than"),
        ("[" * 30_000, "$.tlcore", "nesting"),
        ('{"rows": ' + "[" * 600 + "]" * 600 + "}", "$.tlcore.rows[0][0]", "more than 32 levels deep"),
        ({"modules": "[" * 600 + "]" * 600}, "$.tlcore.modules", "1 to 64"),
        ({"k" * 30_000: 1}, f'$.tlcore["{"k" * 76}...]', "unknown key"),
        ('{"rows": {"from": 1e400}}', "$.tlcore.rows.from", "finite"),
        ('{"rows": {"from": ' + "9" * 5000 + "}}", "$.tlcore", "too long"),
        ('{"modules": ["a", {"b": "\\ud800"}]}', "$.tlcore.modules[1]", r'{"b": "\ud800"} is not allowed'),
        ('{"\\ud800": 1}', r'$.tlcore["\ud800"]', "unknown key"),
        ([], "$.tlcore", "JSON object"),
        ("true", "$.tlcore", "JSON object"),
    ],
)
def test_a_wrong_one_is_refused_with_its_key(given: Any, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        request_choice(given)
    assert caught.value.path == path and words in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        json.dumps({"modules": [0] * 5000}),
        json.dumps({f"key{number}": 1 for number in range(2000)}),
        json.dumps({"rows": {f"from{number}": 1 for number in range(1500)}}),
        json.dumps({"modules": ["*" * 200 + f"z{number}" for number in range(64)]}),
        json.dumps({"modules": ["*".join("model.layers.") + f"*{number}z*" for number in range(4)]}),
        json.dumps({"modules": ["*".join("model.layers.") + f"*{number}z*" for number in range(64)]}),
    ],
    ids=["wrong items", "unknown keys", "unknown ends", "stars", "parts", "many parts"],
)
def test_none_keeps_a_server_long(given: str) -> None:
    begin = time.process_time()
    with suppress(ConfigError):
        choice = request_choice(given)
        assert choice is not None and choice.modules is not None
        names = ModuleNames(choice.modules)
        assert not any(f"model.layers.{number}.mlp" in names for number in range(4000))
    assert time.process_time() - begin < 0.5


def test_nothing_is_allowed_by_default_but_to_be_left_out() -> None:
    allowed = Allowed.of(load_config({}))
    assert allowed.refusal(RequestChoice(enabled=False, rows="last")) is None
    for key, choice in {
        "enabled": RequestChoice(enabled=True),
        "modules": RequestChoice(modules=("a",)),
        "rows": RequestChoice(rows=Window()),
        "deliver": RequestChoice(deliver=True),
    }.items():
        refusal = allowed.refusal(choice)
        assert refusal is not None and refusal.path == f"$.tlcore.{key}"


@pytest.mark.parametrize(
    ("own", "asked", "fits"),
    [
        ("all", "last", True),
        ("all", {"from": 2}, True),
        ("last", "last", True),
        ("last", "all", True),
        ("last", "prompt", False),
        ("prompt", "last", False),
        ("prompt", "response", True),
    ],
)
def test_rows_are_only_narrowed(own: Any, asked: Any, fits: bool) -> None:
    allowed = Allowed.of(load_config({"rows": own, "request_overrides": ["rows"]}))
    assert Allowed.from_json(json.loads(json.dumps(allowed.to_json()))) == allowed
    choice = request_choice({"rows": asked})
    assert choice is not None
    refusal = allowed.refusal(choice)
    assert (refusal is None) == fits
    if refusal is not None:
        assert refusal.path == "$.tlcore.rows"


def test_an_unknown_module_is_told_with_the_nearest_one() -> None:
    error = unknown_module(1, "layers.5", {"model.layers.5", "model.norm"})
    assert error.path == "$.tlcore.modules[1]" and '"model.layers.5"' in str(error)
