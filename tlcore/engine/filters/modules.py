"""Which modules, and which of their calls in a step, the patterns of `module_call_match` select."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from ...errors import ConfigError

Calls = frozenset[int] | Literal["all"]

# A colon after an even number of backslashes is not escaped.
_CALL_INDEX = re.compile(r"(?<!\\)(?P<slashes>(?:\\\\)*):(?P<index>[0-9]+)\Z")


def parse_pattern(text: str, path: str = "$.module_call_match") -> tuple[re.Pattern[str], int | None]:
    r"""Split a pattern into its regular expression and its call index (None = every call).

    A trailing ``:3`` is a call index; ``\:3``, ``(?:3)`` and ``[:3]`` are not. Raises ConfigError at
    ``path`` with the regex engine's message and position.
    """
    whole = check_regex(text, path)
    found = _CALL_INDEX.search(text)
    if found is None:
        return whole, None
    try:
        index = int(found["index"])
    except ValueError as error:
        raise ConfigError(path, f"the pattern is too large to use: {error}.") from None
    return check_regex(text[: found.end("slashes")], path), index


def check_regex(text: str, path: str) -> re.Pattern[str]:
    """A regular expression. Raises ConfigError at ``path`` with the regex engine's message and position."""
    try:
        return re.compile(text)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        problem = f"{text!r} is not a regular expression: {error.msg}{where}."
        raise ConfigError(path, problem, "See Python's re module for the syntax.") from None
    except (OverflowError, RecursionError, ValueError) as error:
        raise ConfigError(path, f"the pattern is too large to use: {error}.") from None


class ModuleFilter:
    """The union of several patterns; None selects every call of every module, no patterns select none."""

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._patterns = tuple(patterns or ())
        self._parsed: tuple[tuple[re.Pattern[str], int | None], ...] | None = None
        if patterns is not None:
            named = enumerate(patterns)
            self._parsed = tuple(parse_pattern(text, f"$.module_call_match[{i}]") for i, text in named)

    def calls(self, module_name: str) -> Calls | None:
        """The selected calls of a module: "all", a set of 0-based indices, or None for none."""
        if self._parsed is None:
            return "all"
        hits = {index for regex, index in self._parsed if regex.search(module_name)}
        if None in hits:
            return "all"
        return frozenset(index for index in hits if index is not None) or None

    def silent(self, heard: Mapping[str, bool]) -> list[str]:
        """The patterns that select modules, but none that was heard; ``heard`` says it of every module."""
        found = []
        for text, (regex, _) in zip(self._patterns, self._parsed or (), strict=True):
            of_these = [was_heard for name, was_heard in heard.items() if regex.search(name)]
            if of_these and not any(of_these):
                found.append(text)
        return found
