"""Configuration: defaults, coercion, normal form, redaction, and errors that say what to do."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import tlcore_schemas
from tlcore import registry
from tlcore.config.configuration import Config, check_config, load_config, load_config_file
from tlcore.errors import ConfigError, TlcoreError
from tlcore.locations import redact_url

SECRET = "hunter2-very-secret"
STORE_OPTIONS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "url": {"type": "string"},
        "retries": {"type": "integer", "minimum": 0},
        "token": {"type": "string", "writeOnly": True},
        "storage_options": {"type": "object"},
    },
}


@pytest.fixture
def store() -> None:
    """Two backends that take options: ``store`` with a schema of them, ``loose`` without."""
    registry.register_sink("store", lambda **_: None, STORE_OPTIONS)  # type: ignore[arg-type]  # never built
    registry.register_sink("loose", lambda **_: None)  # type: ignore[arg-type]  # never built


def error_of(value: Any = None, **keys: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(value, **keys)
    return caught.value


def test_defaults_are_those_of_the_schema() -> None:
    config = load_config()
    assert config == load_config({}) == load_config("{}") == load_config(None)
    properties = tlcore_schemas.load("config.v1")["properties"]
    assert config.to_json(redact=False) == {key: entry["default"] for key, entry in properties.items()}
    assert (config.enabled, config.output_dir, config.backend) == (True, "/tmp/vllm_intermediates", "pt")
    assert (config.log_step_ids, config.module_call_match, config.queue_bytes) == ((0,), None, 1 << 30)


def test_every_key_has_a_title_a_description_and_a_valid_default() -> None:
    schema = tlcore_schemas.load("config.v1")
    for key, entry in schema["properties"].items():
        assert {"title", "description", "default"} <= set(entry), key
        Draft202012Validator(entry).validate(entry["default"])


@pytest.mark.parametrize("name", ["config.v1", "rules.v1", "run.v1", "step.v1", "backend/pt.v1"])
def test_schemas_are_valid_json_schema(name: str) -> None:
    Draft202012Validator.check_schema(tlcore_schemas.load(name))


def test_a_loaded_schema_is_a_copy() -> None:
    tlcore_schemas.load("config.v1").clear()
    assert tlcore_schemas.load("config.v1")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("enabled", "true", True),
        ("enabled", "false", False),
        ("log_step_ids", "[0, 1]", (0, 1)),
        ("log_step_ids", ["0", "1"], (0, 1)),
        ("log_step_ids", "[]", ()),
        ("queue_bytes", "1073741824", 1 << 30),
        ("queue_bytes", "1e3", 1000),
        ("max_tensor_size", "null", None),
        ("max_tensor_size", "5", 5),
        ("block_s", "0.5", 0.5),
        ("device_names", '["cuda:0"]', ("cuda:0",)),
        ("module_call_match", r"layers\.0\.", (r"layers\.0\.",)),
        ("module_call_match", "[ab]", ("[ab]",)),
        ("module_call_match", ["a", "b:1"], ("a", "b:1")),
        ("module_call_match", "null", ("null",)),
        ("output_dir", "5", "5"),
        ("backend", '{"name": "pt"}', "pt"),
        ("on_full", "drop", "drop"),
    ],
)
def test_strings_are_read_as_the_schema_asks(key: str, text: Any, value: Any) -> None:
    assert getattr(load_config({key: text}), key) == value
    assert getattr(load_config(json.dumps({key: text})), key) == value
    assert getattr(load_config(**{key: text}), key) == value


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("enabled", "True"),
        ("enabled", "yes"),
        ("enabled", "1"),
        ("enabled", 1),
        ("enabled", ""),
        ("log_step_ids", "0"),
        ("log_step_ids", "0,1"),
        ("log_step_ids", 0),
        ("queue_bytes", "1GiB"),
        ("queue_bytes", True),
        ("queue_bytes", "true"),
        ("queue_bytes", 0),
        ("queue_bytes", 1.5),
        ("queue_bytes", 2**63),
        ("max_tensor_size", False),
        ("block_s", -1),
        ("block_s", "Infinity"),
        ("block_s", "NaN"),
        ("block_s", 1e300),
        ("on_full", "Drop"),
        ("on_full", None),
        ("output_dir", ""),
        ("output_dir", "a\0b"),
        ("output_dir", None),
        ("device_names", "cuda:0"),
        ("device_names", ["cuda:x"]),
        ("module_call_match", []),
        ("module_call_match", ""),
        ("module_call_match", 3),
        ("backend", 3),
        ("backend", ""),
        ("backend", {}),
        ("backend", {"name": 3}),
    ],
)
def test_nothing_else_is_guessed(key: str, text: Any) -> None:
    error = error_of({key: text})
    assert error.path.startswith(f"$.{key}")
    assert "allowed" in error.problem or "missing" in error.problem


@pytest.mark.parametrize(
    ("document", "path", "says"),
    [
        ({"log_step_ids": [0, -1]}, "$.log_step_ids[1]", "-1 is not allowed; allowed: an integer >= 0."),
        ({"log_step_ids": "[0, -1]"}, "$.log_step_ids[1]", "-1 is not allowed; allowed: an integer >= 0."),
        ({"log_step_ids": [True]}, "$.log_step_ids[0]", "true is not allowed; allowed: an integer >= 0."),
        ({"module_call_match": ["a", 5]}, "$.module_call_match[1]", "5 is not allowed; allowed: a non-empty"),
        ({"module_call_match": "a("}, "$.module_call_match", "unterminated subpattern at position 1"),
        (
            {"module_call_match": ["a", "("]},
            "$.module_call_match[1]",
            "unterminated subpattern at position 0",
        ),
        ({"on_full": "blok"}, "$.on_full", '"blok" is not allowed; allowed: "block" or "drop".'),
        ({"block_s": float("nan")}, "$.block_s", "the number must be finite"),
        ({"block_s": float("inf")}, "$.block_s", "the number must be finite"),
        ({"output_dir": object()}, "$.output_dir", "object cannot be used here"),
        ({"output_dir": "s3://"}, "$.output_dir", "names no bucket or directory"),
        ({"backend": "fsspec"}, "$.output_dir", "is no URL"),
        ({"backend": {"name": "fsspec", "url": "/tmp/x"}}, "$.backend.url", "is no URL"),
        (
            {"backend": {"name": "fsspec", "url": "s3://a/b"}, "output_dir": "s3://a/c"},
            "$.backend.url",
            "different places",
        ),
        ({"backend": {"options": 1}}, "$.backend", 'the key "name" is missing'),
        ({"backend": object()}, "$.backend", "builtins.object object cannot be used here"),
        ({"backend": {"name": "pt", "level": 3}}, "$.backend.level", "unknown key"),
        ({3: 4}, "$", "keys must be strings, not int"),
        ({"backend": {"name": "pt", 3: 4}}, "$.backend", "keys must be strings, not int"),
    ],
)
def test_errors_name_the_path_the_value_and_what_is_allowed(document: Any, path: str, says: str) -> None:
    error = error_of(document)
    assert error.path == path
    assert says in error.problem
    assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("key", "near"),
    [("enabld", "enabled"), ("log_steps_id", "log_step_ids"), ("Backend", "backend"), ("block", "block_s")],
)
def test_an_unknown_key_gives_the_nearest_valid_one(key: str, near: str) -> None:
    error = error_of({key: SECRET})
    assert (error.path, error.hint) == (f"$.{key}", f'Did you mean "{near}"?')
    assert SECRET not in str(error)


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    error = error_of({"zzz zzz": 1})
    assert error.path == '$["zzz zzz"]'
    assert "enabled, output_dir, module_call_match" in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1, column 1"),
        ("{,", "line 1, column 2"),
        ('{\n  "enabled": tru\n}', "line 2, column 14"),
        ('{"enabled": true, "enabled": false}', 'the key "enabled" appears twice'),
        ('{"backend": {"name": "pt", "name": "x"}}', 'the key "name" appears twice'),
        ('{"block_s": NaN}', "NaN is not a JSON number"),
        ('{"block_s": -Infinity}', "-Infinity is not a JSON number"),
        ('{"queue_bytes": ' + "9" * 5000 + "}", "a number is too long"),
        ("[" * 100_000, "nesting too deep"),
        ("[]", "must be a JSON object"),
        ("true", "must be a JSON object"),
    ],
)
def test_unsound_json_is_located(text: str, says: str) -> None:
    error = error_of(text)
    assert error.path == "$"
    assert says in error.problem


def test_all_problems_are_found_at_once() -> None:
    config, found = check_config(
        {"enabld": 1, "capture": "statistics", "log_step_ids": [-1], "module_call_match": "("}
    )
    assert config is None
    paths = {error.path for error in found}
    assert paths == {"$.enabld", "$.capture", "$.log_step_ids[0]", "$.module_call_match"}


@pytest.mark.parametrize("capture", ["tensor", "both", "stats", "channels"])
def test_only_tensors_are_delivered(capture: str) -> None:
    config, found = check_config({"capture": capture, "delivery": True})
    if capture in ("tensor", "both"):
        assert config is not None and config.delivery
    else:
        (error,) = found
        assert error.path == "$.delivery" and f'"capture": "{capture}"' in error.problem
    assert check_config({"capture": capture})[0] is not None


def test_python_values_stand_for_their_json(tmp_path: Path) -> None:
    config = load_config(log_step_ids=range(3), module_call_match=("a", "b"), output_dir=tmp_path)
    assert config == load_config(
        {"log_step_ids": [0, 1, 2], "module_call_match": ["a", "b"]}, output_dir=str(tmp_path)
    )


def test_keywords_win_over_the_document_and_a_config_can_be_varied() -> None:
    base = load_config('{"log_step_ids": [1], "fsync": true}', log_step_ids=[2])
    assert (base.log_step_ids, base.fsync) == ((2,), True)
    assert load_config(base) == base
    assert load_config(base, fsync=False).log_step_ids == (2,)


def test_selected_steps() -> None:
    assert [load_config(log_step_ids=[0, 2]).selects_step(i) for i in range(4)] == [True, False, True, False]
    assert load_config(log_step_ids=[]).selects_step(10**9)
    assert not load_config(enabled=False, log_step_ids=[]).selects_step(0)


def test_backend_options_have_one_normal_form(store: None) -> None:
    as_object = load_config(
        backend={"name": "store", "url": "x", "retries": "3", "storage_options": '{"a": 1}'}
    )
    assert as_object.backend == "store"
    assert as_object.backend_options == {"url": "x", "retries": 3, "storage_options": {"a": 1}}
    assert load_config(backend="store") == load_config(backend={"name": "store"})
    assert load_config(as_object.to_json(redact=False)) == as_object
    assert pickle.loads(pickle.dumps(as_object)) == as_object


@pytest.mark.parametrize(
    ("backend", "path", "hint"),
    [
        ({"name": "store", "retrys": SECRET}, "$.backend.retrys", 'Did you mean "retries"?'),
        ({"name": "store", "retries": SECRET}, "$.backend.retries", None),
        ({"name": "store", "retries": -1}, "$.backend.retries", None),
        ({"name": "store", "token": [SECRET]}, "$.backend.token", None),
        ({"name": "store", "storage_options": SECRET}, "$.backend.storage_options", None),
        ({"storage_options": {"secret": SECRET}}, "$.backend", None),
        ({"name": [SECRET], "token": SECRET}, "$.backend.name", None),
        ([{"token": SECRET}], "$.backend", None),
        ('{"name": "store", "token": "' + SECRET, "$.backend", None),
    ],
)
def test_errors_in_options_never_show_a_value(store: None, backend: Any, path: str, hint: str | None) -> None:
    error = error_of(backend=backend)
    assert (error.path, error.hint) == (path, hint)
    assert SECRET not in str(error)
    assert "-1" not in str(error)


def test_redaction_keeps_only_what_the_schema_declares_public(store: None) -> None:
    options = {"url": f"s3://user:{SECRET}@host/b?sig={SECRET}", "retries": 2, "token": SECRET}
    config = load_config(
        backend={"name": "store", **options, "storage_options": {"key": SECRET, "n": {"a": SECRET}}}
    )
    assert SECRET not in repr(config)
    assert config.to_json(redact=True)["backend"] == {
        "name": "store",
        "url": "s3://***@host/b?***",
        "retries": 2,
        "token": "***",
        "storage_options": {"key": "***", "n": "***"},
    }
    assert SECRET not in repr(
        load_config(backend={"name": "loose", "anything": SECRET, "more": {SECRET[:3]: SECRET}})
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/plain/path?x#y", "/plain/path?x#y"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("s3://k:s@bucket/a", "s3://***@bucket/a"),
        ("https://h/a?sig=1#f", "https://h/a?***"),
        ("https://h?sig=1", "https://h?***"),
        ("https://a:b/c@h/x", "https://***@h/x"),
        ("https://a:b?c#d@h/x", "https://***@h/x"),
        ("s3://token@h/x", "s3://***@h/x"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_urls_are_shown_without_credentials(text: str, shown: str) -> None:
    assert redact_url(text) == shown


def test_a_url_goes_to_a_backend_that_is_not_built_in(store: None) -> None:
    assert load_config(output_dir="s3://bucket/x", backend="store").output_dir == "s3://bucket/x"


def test_files_are_read_and_what_cannot_be_is_explained(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text('\ufeff{"log_step_ids": [4]}', encoding="utf-8")
    assert load_config_file(good).log_step_ids == (4,)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, says in [("none.json", "No such file"), (".", "directory"), ("binary.json", "not UTF-8")]:
        with pytest.raises(ConfigError, match=says):
            load_config_file(tmp_path / name)


def test_errors_survive_pickling_between_processes() -> None:
    error = error_of({"enabld": 1})
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.hint) == (str(error), error.path, error.hint)
    assert isinstance(copy, TlcoreError)


def test_loading_a_configuration_does_not_import_torch() -> None:
    code = (
        "import sys; from tlcore.config.configuration import load_config; load_config();"
        " print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "enabled": st.booleans(),
    "log_step_ids": st.lists(st.integers(0, 2**63 - 1), max_size=4),
    "max_tensor_size": st.none() | st.integers(0, 2**63 - 1),
    "device_names": st.lists(st.sampled_from(["cpu", "cuda:0", "cuda:11"]), max_size=3),
    "log_post_fwd_inputs": st.booleans(),
    "max_run_bytes": st.none() | st.integers(1, 2**63 - 1),
    "queue_bytes": st.integers(1, 2**63 - 1),
    "on_full": st.sampled_from(["block", "drop"]),
    "block_s": st.floats(0, 86400) | st.integers(0, 86400),
    "fsync": st.booleans(),
    "on_error": st.sampled_from(["warn", "raise"]),
}
DOCUMENTS = st.fixed_dictionaries({}, optional=VALUES)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(DOCUMENTS)
def test_every_spelling_of_a_document_is_one_configuration(document: dict[str, Any]) -> None:
    config = load_config(document)
    as_text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in document.items()}
    assert load_config(json.dumps(document)) == config
    assert load_config(as_text) == config
    assert load_config(**document) == config
    assert load_config(config.to_json(redact=False)) == config
    assert load_config(json.dumps(config.to_json(redact=True))) == config


@given(
    st.dictionaries(
        st.sampled_from([*VALUES, "backend", "module_call_match", "output_dir", "x"]), JSON_VALUES
    )
)
def test_any_document_loads_or_is_a_config_error(document: dict[str, Any]) -> None:
    config, found = check_config(document)
    assert isinstance(config, Config) != bool(found)
    assert all(error.path.startswith("$") for error in found)
