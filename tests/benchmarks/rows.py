"""What a benchmark reports: one `Row` a measured ratio, and how much is measured (`Scale`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Scale:
    """How much is measured: the model, its input, and how often; medians are over ``repeats``."""

    name: Literal["full", "quick", "tiny"]
    repeats: int
    # Pairs whose ratio is so close to 1 that a few would not show it.
    pairs: int
    prompt_tokens: int
    decode_steps: int
    requests: int = 8
    # Of the run that shows whether anything grows with the steps; `--steps` gives another number.
    long_steps: int = 1_000_000

    @property
    def tiny(self) -> bool:
        """Whether a toy stands for the real model: for the test of the program itself."""
        return self.name == "tiny"


SCALES = {
    "full": Scale("full", repeats=9, pairs=60, prompt_tokens=256, decode_steps=50),
    "quick": Scale("quick", repeats=5, pairs=10, prompt_tokens=256, decode_steps=50, long_steps=20_000),
    "tiny": Scale("tiny", repeats=2, pairs=2, prompt_tokens=16, decode_steps=3, long_steps=300),
}


@dataclass(frozen=True)
class Limit:
    """The target of a row: at most, or at least, a value."""

    kind: Literal["at most", "at least"]
    value: float

    def holds(self, measured: float) -> bool:
        """Whether ``measured`` meets the target."""
        return measured <= self.value if self.kind == "at most" else measured >= self.value


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio, its target where it has one, and what stands behind it.

    ``unit`` says what the ratio counts where that is not plain; ``detail`` holds the figures that made it.
    """

    what: str
    measured: float
    target: Limit | None = None
    unit: str = ""
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.target.holds(self.measured)

    def to_json(self) -> dict[str, Any]:
        """The row for ``--json``."""
        target = None if self.target is None else [self.target.kind, self.target.value]
        return {
            "what": self.what,
            "measured": self.measured,
            "unit": self.unit,
            "target": target,
            "met": self.met,
            "detail": self.detail,
        }


def at_most(value: float) -> Limit:
    """A target that larger values miss."""
    return Limit("at most", value)


def at_least(value: float) -> Limit:
    """A target that smaller values miss."""
    return Limit("at least", value)
