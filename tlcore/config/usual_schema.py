"""JSON Schema as far as most configurations need it, which are right: loading all of it takes 40 ms.

What this accepts `jsonschema` accepts, too; all else, and whatever a schema has that is not known here, is
left to that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sized
from typing import Any

Schema = Mapping[str, Any]
# What says nothing of a value. `then` is looked at together with `if`.
_NOTES = frozenset(("$schema", "title", "description", "default", "writeOnly", "x-allowed", "then"))
_PLAIN = (str, type(None))


class _UnknownError(Exception):
    """A schema has something that is not known here."""


def is_certainly_valid(value: Any, schema: Schema) -> bool:
    """Whether a value (JSON data) fits; False also where that is not known."""
    try:
        return _fits(value, schema)
    except (_UnknownError, RecursionError, re.error, TypeError):
        return False


def is_of_type(value: Any, name: str) -> bool:
    """Whether a value is of a JSON type; a bool is no number, and 1.0 is an integer."""
    if name in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return name == "number" or isinstance(value, int) or value.is_integer()
    return isinstance(value, _TYPES[name])


_TYPES: dict[str, Any] = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}


def _fits(value: Any, schema: Any) -> bool:
    if not isinstance(schema, dict):
        raise _UnknownError
    for key, rule in schema.items():
        if key in _NOTES:
            continue
        check = _CHECKS.get(key)
        if check is None:
            raise _UnknownError
        if not check(value, rule, schema):
            return False
    return True


def _type(value: Any, rule: Any, schema: Schema) -> bool:
    names = [rule] if isinstance(rule, str) else rule
    if not all(name in _TYPES or name in ("integer", "number") for name in names):
        raise _UnknownError
    return any(is_of_type(value, name) for name in names)


def _enum(value: Any, rule: Any, schema: Schema) -> bool:
    # Of texts alone it is plain what is equal.
    if not all(isinstance(each, _PLAIN) for each in rule):
        raise _UnknownError
    return isinstance(value, _PLAIN) and value in rule


def _const(value: Any, rule: Any, schema: Schema) -> bool:
    return _enum(value, [rule], schema)


def _of_number(holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Schema], bool]:
    return lambda value, rule, schema: not is_of_type(value, "number") or holds(value, rule)


def _of_size(kind: type[Sized], holds: Callable[[int, Any], bool]) -> Callable[[Any, Any, Schema], bool]:
    return lambda value, rule, schema: not isinstance(value, kind) or holds(len(value), rule)


def _pattern(value: Any, rule: Any, schema: Schema) -> bool:
    return not isinstance(value, str) or re.search(rule, value) is not None


def _items(value: Any, rule: Any, schema: Schema) -> bool:
    return not isinstance(value, list) or all(_fits(each, rule) for each in value)


def _properties(value: Any, rule: Any, schema: Schema) -> bool:
    return not isinstance(value, dict) or all(
        _fits(value[key], own) for key, own in rule.items() if key in value
    )


def _additional(value: Any, rule: Any, schema: Schema) -> bool:
    if not isinstance(rule, bool):
        raise _UnknownError
    return rule or not isinstance(value, dict) or value.keys() <= schema.get("properties", {}).keys()


def _required(value: Any, rule: Any, schema: Schema) -> bool:
    return not isinstance(value, dict) or all(key in value for key in rule)


def _any_of(value: Any, rule: Any, schema: Schema) -> bool:
    return any(_fits(value, each) for each in rule)


def _if(value: Any, rule: Any, schema: Schema) -> bool:
    if "else" in schema:
        raise _UnknownError
    return not _fits(value, rule) or _fits(value, schema.get("then", {}))


def _dependent(value: Any, rule: Any, schema: Schema) -> bool:
    return not isinstance(value, dict) or all(_fits(value, own) for key, own in rule.items() if key in value)


_CHECKS: dict[str, Callable[[Any, Any, Schema], bool]] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "minimum": _of_number(lambda value, least: bool(value >= least)),
    "maximum": _of_number(lambda value, most: bool(value <= most)),
    "minLength": _of_size(str, lambda size, least: bool(size >= least)),
    "maxLength": _of_size(str, lambda size, most: bool(size <= most)),
    "minItems": _of_size(list, lambda size, least: bool(size >= least)),
    "maxItems": _of_size(list, lambda size, most: bool(size <= most)),
    "minProperties": _of_size(dict, lambda size, least: bool(size >= least)),
    "pattern": _pattern,
    "items": _items,
    "properties": _properties,
    "additionalProperties": _additional,
    "required": _required,
    "anyOf": _any_of,
    "if": _if,
    "dependentSchemas": _dependent,
}
