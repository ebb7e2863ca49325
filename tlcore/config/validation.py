"""Coerce a value by a JSON Schema and say in plain words where it does not fit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, nearest
from ..layout.jsontext import parse_json

Schema = Mapping[str, Any]
PathPart = str | int

_LONGEST_SHOWN = 80
# Deeper than anything that is asked for, and far from where Python gives up.
_DEEPEST = 32
_NOUNS = {
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def json_path(parts: Sequence[PathPart]) -> str:
    """``["a", 0, "b c"]`` -> ``$.a[0]["b c"]``."""
    steps = []
    for part in parts:
        if isinstance(part, int):
            steps.append(f"[{part}]")
        else:
            steps.append(f".{part}" if _is_plain(part) else f"[{show(part)}]")
    return "$" + "".join(steps)


def _is_plain(key: str) -> bool:
    return len(key) <= _LONGEST_SHOWN and key.isidentifier()


def plain(value: Any, parts: tuple[PathPart, ...] = ()) -> Any:
    """``value`` as JSON data: tuples and ranges become lists, paths strings, mappings dicts.

    Raises ConfigError for a key that is not a string, a NaN or infinity, any other type, and values in values
    without an end.
    """
    if len(parts) > _DEEPEST:
        raise ConfigError(json_path(parts[:4]), f"it is nested more than {_DEEPEST} levels deep.")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(json_path(parts), f"{value} is not allowed: the number must be finite.")
        return value
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, (list, tuple, range)):
        return [plain(item, (*parts, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(json_path(parts), f"keys must be strings, not {type(key).__name__}.")
        return {key: plain(item, (*parts, key)) for key, item in value.items()}
    problem = f"a {type(value).__module__}.{type(value).__qualname__} object cannot be used here."
    raise ConfigError(json_path(parts), problem, "Give a value that JSON can express.")


def coerce(value: Any, schema: Schema) -> Any:
    """Read strings as JSON where ``schema`` asks for something that is not a string, at any depth.

    A string that fits as it stands is kept; a string whose JSON reading has no allowed type is kept
    too, so that validation can report it. Whole floats become integers where only those are allowed.
    """
    if isinstance(value, str):
        value = _from_text(value, schema)
    branch = _branch(schema, value)
    if branch is None:
        return value
    if isinstance(value, list) and isinstance(branch.get("items"), Mapping):
        return [coerce(item, branch["items"]) for item in value]
    if isinstance(value, dict):
        known = branch.get("properties", {})
        return {key: coerce(item, known[key]) if key in known else item for key, item in value.items()}
    if isinstance(value, float) and "number" not in _types(branch) and "integer" in _types(branch):
        return int(value)
    return value


def _from_text(text: str, schema: Schema) -> Any:
    as_string = _branch(schema, text)
    if as_string is not None and _validator(as_string).is_valid(text):
        return text
    try:
        value = plain(parse_json(text))
    except ConfigError:
        return text
    return text if isinstance(value, str) or _branch(schema, value) is None else value


def _types(schema: Schema) -> Sequence[str]:
    declared = schema.get("type", ())
    return (declared,) if isinstance(declared, str) else declared


def _branch(schema: Schema, value: Any) -> Schema | None:
    """The alternative of ``schema`` that is about values of this type; None when there is none."""
    for branch in schema.get("anyOf", (schema,)):
        types = _types(branch)
        if not types or any(_is(value, name) for name in types):
            return dict(branch)
    return None


def _is(value: Any, type_name: str) -> bool:
    """Whether a value is of a JSON type; a bool is no number, and 1.0 is an integer."""
    from jsonschema import Draft202012Validator

    return bool(Draft202012Validator.TYPE_CHECKER.is_type(value, type_name))


def _validator(schema: Schema) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema)


def problems(
    value: Any, schema: Schema, parts: tuple[PathPart, ...] = (), hidden: Collection[str] | None = ()
) -> list[ConfigError]:
    """Everything in ``value`` (already coerced) that ``schema`` does not allow, in the order of its keys.

    ``parts`` is where ``value`` lies in the whole document. Values under the top-level keys ``hidden``
    (None = under any key) are never shown, as they may hold secrets.
    """
    return list(each_problem(value, schema, parts, hidden))


def each_problem(
    value: Any, schema: Schema, parts: tuple[PathPart, ...] = (), hidden: Collection[str] | None = ()
) -> Iterator[ConfigError]:
    """`problems` one by one, for whoever needs only the first: a value may have very many."""
    for error in _validator(schema).iter_errors(value):
        deepest = _deepest(error)
        inside = tuple(deepest.absolute_path)
        secret = hidden is None or (bool(inside) and inside[0] in hidden)
        yield from _explain(deepest, (*parts, *inside), secret)


def _deepest(error: Any) -> Any:
    """Follow ``anyOf`` into the alternative that was meant: the one of the value's own type."""
    while error.validator == "anyOf":
        depth = len(error.absolute_path)
        others = {
            inner.relative_schema_path[0]
            for inner in error.context
            if inner.validator == "type" and len(inner.absolute_path) == depth
        }
        meant = [inner for inner in error.context if inner.relative_schema_path[0] not in others]
        if not meant:
            break
        error = meant[0]
    return error


def _explain(error: Any, parts: tuple[PathPart, ...], secret: bool) -> Iterator[ConfigError]:
    if error.validator == "additionalProperties" and error.validator_value is False:
        known = list(error.schema.get("properties", {}))
        yield from (unknown_key(parts, key, known) for key in error.instance if key not in known)
        return
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        yield ConfigError(json_path(parts), f'the key "{missing}" is missing.')
        return
    shown = noun(error.instance) if secret else show(error.instance)
    near = error.validator == "enum" and isinstance(error.instance, str)
    hint = (
        did_you_mean(error.instance, [each for each in error.validator_value if isinstance(each, str)])
        if near
        else None
    )
    yield ConfigError(json_path(parts), f"{shown} is not allowed; allowed: {allowed(error.schema)}.", hint)


def unknown_key(parts: tuple[PathPart, ...], key: str, known: Sequence[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    hint = did_you_mean(key, known)
    if hint is None:
        hint = f"Valid keys: {', '.join(known)}." if known else "No keys are allowed here."
    return ConfigError(json_path((*parts, key)), "unknown key.", hint)


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """``Did you mean "..."?``, or None when nothing is close."""
    close = nearest(word.lower(), known)
    return f'Did you mean "{close[0]}"?' if close else None


def show(value: Any) -> str:
    """A value as JSON, cut to a line."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def noun(value: Any) -> str:
    """What kind of value it is, without the value: ``a string``."""
    if isinstance(value, bool):
        return "a boolean"
    for name in ("null", "integer", "number", "string", "array", "object"):
        if _is(value, name):
            return _NOUNS[name]
    return f"a {type(value).__name__}"


def allowed(schema: Schema) -> str:
    """What a schema allows, in words: ``an integer >= 0 or null``."""
    if "anyOf" in schema:
        return " or ".join(allowed(branch) for branch in schema["anyOf"])
    if "x-allowed" in schema:
        return str(schema["x-allowed"])
    if "enum" in schema:
        return " or ".join(json.dumps(choice) for choice in schema["enum"])
    return " or ".join(_allowed_type(name, schema) for name in _types(schema)) or "another value"


def _allowed_type(name: str, schema: Schema) -> str:
    if name == "array" and "items" in schema:
        return f"an array, each item {allowed(schema['items'])}"
    if name not in ("integer", "number"):
        return _NOUNS[name]
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and high < 2**53:
        return f"{_NOUNS[name]} from {low} to {high}"
    return _NOUNS[name] + (f" >= {low}" if low is not None else "")
