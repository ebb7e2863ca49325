"""The patterns of a configuration: regular expressions, some with the index of a call behind them."""

from __future__ import annotations

import math
import re

from ..errors import ConfigError

# A colon after an even number of backslashes is not escaped.
_CALL_INDEX = re.compile(r"(?<!\\)(?P<slashes>(?:\\\\)*):(?P<index>[0-9]+)\Z")

# What is escaped, a set of characters, a group's kind, a choice, or a repetition, perhaps of a group.
_COSTLY = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?|(?P<choice>\|)"
    r"|(?P<group>\))?(?P<repetition>(?:[*+]|\{[0-9]*,?[0-9]*\}|\?)[?+]?)",
    re.DOTALL,
)
# In a comment nothing means what it does elsewhere, and in verbose patterns there are comments, too.
_COMMENTED = re.compile(r"\(\?(?:[a-zA-Z-]*x|#)")
# Of a text that is searched, so many characters are looked at.
LONGEST_SEARCHED = 256


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
        # As in file names, where it stands for any text by itself.
        advice = 'Any text is ".*".' if error.msg.startswith(("nothing to repeat", "multiple repeat")) else ""
        raise ConfigError(path, problem, advice or "See Python's re module for the syntax.") from None
    except (OverflowError, RecursionError, ValueError) as error:
        raise ConfigError(path, f"the pattern is too large to use: {error}.") from None


def most_steps(text: str) -> float:
    """How many steps a search for a regular expression takes at most, roughly: infinite where groups repeat.

    A text of `LONGEST_SEARCHED` characters may be divided among repetitions in each way that there is.
    """
    steps: float = LONGEST_SEARCHED
    for each in _COSTLY.finditer(text):
        if each["group"]:
            return math.inf
        steps *= 2 if each["choice"] else LONGEST_SEARCHED if each["repetition"] else 1
    return math.inf if _COMMENTED.search(text) else steps
