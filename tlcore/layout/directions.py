"""What of a module's call is stored, by the words that stand in names, records and structure documents."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .names import safe

DIRECTIONS = ("inputs", "outputs", "post_fwd_inputs")
# Those of a further backward in the step have a `~2` and so on.
GRADIENTS = ("grad_outputs", "grad_inputs")
_TAP, _OPERATOR = "tap.", "op."
# Of a structure document's name. What follows it may be a rank's suffix, so no tap's name has that in it.
_NAMED = rf"{'|'.join(DIRECTIONS)}|(?:{'|'.join(GRADIENTS)})(?:~[1-9][0-9]*)?"
_FREE = r"(?:(?!_rank_)[A-Za-z0-9_.\-+=@,()\[\]%~])+"
PATTERN = rf"(?:{_NAMED}|tap\.{_FREE}|op\.[0-9]{{4,9}}\.{_FREE})"
_WHOLE = re.compile(PATTERN)


def tap_direction(name: str, number: int) -> str:
    """``tap.q`` for what `tlcore.tap` shows as ``q`` in a call, ``tap.q_1`` for the second time."""
    plain = _TAP + _free(name)
    return f"{plain}_{number}" if number else plain


def operator_direction(name: str, number: int) -> str:
    """``op.0003.mul`` for the operator ``mul`` that is the fourth of a call."""
    return f"{_OPERATOR}{number:04d}.{_free(name)}"


def _free(name: str) -> str:
    return safe(name).replace("_rank_", "_rank%5F")


def tap_name(module: str, name: str) -> str:
    """By what name patterns find a tap: ``<module>.tap.<name>``, without the dot for the model itself."""
    return f"{module}.{_TAP}{name}" if module else _TAP + name


def gradient_direction(direction: str, backward: int) -> str:
    """``grad_inputs`` for gradients of ``inputs`` from a step's backward 1, then ``grad_inputs~2``."""
    return f"grad_{direction}" if backward == 1 else f"grad_{direction}~{backward}"


def is_gradient(direction: str) -> bool:
    """Whether it is of gradients."""
    return direction.startswith("grad_")


def is_tap(direction: str) -> bool:
    """Whether it is a tap's, and so neither an argument nor a result."""
    return direction.startswith(_TAP)


def is_operator(direction: str) -> bool:
    """Whether it is what an operator within the call gave."""
    return direction.startswith(_OPERATOR)


def is_amid(direction: str) -> bool:
    """Whether it is of something in the midst of a call: a tap's, or an operator's."""
    return is_tap(direction) or is_operator(direction)


def is_direction(value: Any) -> bool:
    """Whether a document's value is one."""
    return isinstance(value, str) and (value in DIRECTIONS or _WHOLE.fullmatch(value) is not None)


def direction_of(stem: str, present: Iterable[str]) -> str | None:
    """Which of the directions that are ``present`` a tensor's name without its directory begins with."""
    found = [each for each in present if stem == each or stem.startswith(f"{each}_")]
    return max(found, key=len, default=None)


def pattern_names(module: str, direction: str) -> tuple[str, ...]:
    """By which names patterns find a module's tensor: its own, and that of a tap or an operator."""
    return (module, f"{module}.{direction}".lstrip(".")) if is_amid(direction) else (module,)
