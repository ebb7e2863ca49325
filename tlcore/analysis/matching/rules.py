"""What is paired and how: the rules of a comparison, read from what the user gave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from ...layout.directions import pattern_names
from ...reader import Step
from ..results import TensorResult
from ..rulebook import Patterns, fits, tensor_name
from .conventions import Rename
from .pairs import Key, key_name


@dataclass(frozen=True, slots=True)
class Rules:
    """What to pair and how: ``maps`` rename A's modules to B's, ``sums`` are output positions to add.

    ``steps`` and ``modules`` limit the comparison (None: all); ``requests`` maps A's request ids to B's.
    ``unshard`` compares the model's tensors, whichever ranks hold them, instead of each rank's own.
    ``maps_b`` rename B's modules, too, where both get other names. ``other_tool``: the runs are of different
    tools, so that what a call takes and returns may be told otherwise.
    ``require`` and ``leave_out`` are what must be there and what is not compared, by tensors' names.
    Each of the ``ranks`` of the side ``spread`` (0: A, 1: B) is held against the other run's whole model.
    With ``both_spread`` that one's ranks tell as little, and are held one by one, too.
    ``same_step`` are numbers of B's steps with those of A's that they are held against.
    """

    maps: tuple[Rename, ...] = ()
    sums: tuple[int, ...] = ()
    steps: frozenset[int] | None = None
    modules: tuple[re.Pattern[str], ...] = ()
    requests: tuple[tuple[str, str], ...] = ()
    ignore_missing: bool = False
    unshard: bool = False
    require: Patterns = ()
    leave_out: Patterns = ()
    maps_b: tuple[Rename, ...] = ()
    other_tool: bool = False
    spread: int | None = None
    ranks: tuple[int, ...] = ()
    both_spread: bool = False
    same_step: tuple[tuple[int, int], ...] = ()

    def leaves_out(self, key: Key) -> bool:
        """Whether a tensor counts as if it were not there."""
        return bool(self.leave_out) and fits(self.leave_out, key_name(key))

    def requires(self, result: TensorResult) -> bool:
        """Whether a tensor must be there, also where what only one run has is ignored."""
        return fits(self.require, tensor_name(result.module, result.direction, result.path))

    def wants(self, module: str, direction: str = "") -> bool:
        """Whether a module's tensor is to be compared; that of a tap is also found by the tap's name."""
        names = pattern_names(module, direction)
        return not self.modules or any(each.search(name) for each in self.modules for name in names)

    def joins_ranks(self, side: int) -> bool:
        """Whether a side (0: A, 1: B) counts as one model, whichever ranks hold its tensors."""
        return self.unshard and side != self.spread and not self.both_spread

    def by_number(self, steps_b: Sequence[Step]) -> dict[int, Step]:
        """B's steps by the numbers of those of A that they are held against."""
        numbers = dict(self.same_step)
        return {numbers.get(step.number, step.number): step for step in steps_b}

    @property
    def bridges(self) -> bool:
        """Whether two implementations are compared, whose calls take and return different structures."""
        return bool(self.maps or self.sums or self.maps_b or self.other_tool)


def renames(texts: str | Iterable[str]) -> tuple[Rename, ...]:
    """``REGEX=REPLACEMENT`` texts, or a single one, as patterns. Raises ConfigError for one that is none."""
    found: list[Rename] = []
    for text in [texts] if isinstance(texts, str) else texts:
        pattern, equals, replacement = text.rpartition("=")
        if not equals:
            raise ConfigError("--map", f"{text!r} is not REGEX=REPLACEMENT")
        compiled = compiled_pattern(pattern, "--map")
        try:
            compiled.sub(replacement, "")
            re.compile(f"{pattern}|").sub(replacement, "")
        except (re.error, IndexError) as error:
            raise ConfigError(
                "--map", f"{replacement!r} is not a replacement for {pattern!r}: {error}"
            ) from error
        found.append((compiled, replacement))
    return tuple(found)


def positions(sums: Iterable[int]) -> tuple[int, ...]:
    """Output positions to be added. Raises ConfigError for a text, whose characters are none, or for one."""
    found = () if isinstance(sums, str) else tuple(sums)
    if isinstance(sums, str) or len(found) == 1:
        text = f"{found or sums!r} is not a sequence of output positions to add, such as (0, 1)"
        raise ConfigError("sums", text)
    return found


def compiled_patterns(texts: str | Iterable[str], where: str) -> tuple[re.Pattern[str], ...]:
    """Regular expressions; a single text is one, as in the configuration. Raises ConfigError."""
    return tuple(compiled_pattern(text, where) for text in ([texts] if isinstance(texts, str) else texts))


def compiled_pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression. Raises ConfigError, naming ``where`` it was given, when it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(where, f"{text!r} is not a regular expression: {error}") from error
