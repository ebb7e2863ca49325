"""Strict JSON text: no duplicate keys, no NaN or Infinity, errors with line and column."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ..errors import ConfigError


class _UnsoundError(ValueError):
    """Text that Python's json module would accept but that is not sound JSON."""


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ConfigError at ``$``; the text itself is never quoted in it."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError("$", f"not valid JSON: {error.msg} at {place}.") from None
    except _UnsoundError as error:
        raise ConfigError("$", f"not valid JSON: {error}.") from None
    except (ValueError, RecursionError):
        raise ConfigError("$", "not usable JSON: a number is too long or the nesting too deep.") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise _UnsoundError(f"the key {json.dumps(key)} appears twice in one object")
        document[key] = value
    return document


def _reject_constant(name: str) -> NoReturn:
    raise _UnsoundError(f"{name} is not a JSON number")
