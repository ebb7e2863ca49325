"""Which modules, and which of their calls in a step, the patterns of `module_call_match` select."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from ...config.patterns import parse_pattern

Calls = frozenset[int] | Literal["all"]


def may_be_tap(pattern: str) -> bool:
    """Whether a pattern may mean what `tlcore.tap` shows, which nobody knows before the model runs."""
    return "tap" in pattern


def _before_tap(pattern: str) -> re.Pattern[str]:
    """What a pattern says of the module whose taps it finds; everything where that cannot be told."""
    try:
        return re.compile(pattern.partition("tap")[0].rstrip(".\\(^"))
    except re.error:
        return re.compile("")


class ModuleFilter:
    """The union of several patterns, those of a configuration's ``key``.

    None selects every call of every module, no patterns select none.
    """

    def __init__(self, patterns: Sequence[str] | None, key: str = "module_call_match") -> None:
        self._patterns = tuple(patterns or ())
        self._parsed: tuple[tuple[re.Pattern[str], int | None], ...] | None = None
        if patterns is not None:
            named = enumerate(patterns)
            self._parsed = tuple(parse_pattern(text, f"$.{key}[{i}]") for i, text in named)
        self._before_taps = [_before_tap(text) for text in self._patterns if may_be_tap(text)]

    def calls(self, module_name: str) -> Calls | None:
        """The selected calls of a module: "all", a set of 0-based indices, or None for none."""
        if self._parsed is None:
            return "all"
        hits = {index for regex, index in self._parsed if regex.search(module_name)}
        if None in hits:
            return "all"
        return frozenset(index for index in hits if index is not None) or None

    def may_find_taps(self, names: Sequence[str]) -> bool:
        """Whether a pattern that speaks of taps may mean those of a module with these names."""
        return any(each.search(name) for each in self._before_taps for name in names)

    def calls_of_any(self, names: Sequence[str]) -> Calls | None:
        """The selected calls of a module that has several names."""
        if len(names) == 1:
            return self.calls(names[0])
        found = [calls for calls in map(self.calls, names) if calls is not None]
        if "all" in found:
            return "all"
        return frozenset().union(*found) or None  # type: ignore[arg-type]

    def silent(self, heard: Mapping[str, bool], names: Mapping[str, Sequence[str]]) -> list[str]:
        """The patterns that select modules, but none that was heard.

        ``heard`` says it of every module, ``names`` has all names of each.
        """
        found = []
        for text, (regex, _) in zip(self._patterns, self._parsed or (), strict=True):
            of_these = [was for name, was in heard.items() if any(map(regex.search, names[name]))]
            if of_these and not any(of_these):
                found.append(text)
        return found

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """The patterns that find none of these names."""
        pairs = zip(self._patterns, self._parsed or (), strict=True)
        return [text for text, (regex, _) in pairs if not any(map(regex.search, names))]
