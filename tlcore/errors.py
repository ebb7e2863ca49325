"""Every error tlcore raises on purpose, so that a caller can catch one base class."""

from __future__ import annotations

from collections.abc import Sequence


class TlcoreError(Exception):
    """Base of all errors that tlcore raises on purpose."""


class ConfigError(TlcoreError, ValueError):
    """A configuration that cannot be used; raised before any model is loaded.

    ``path`` is the JSON path of the offending value (``$.log_step_ids[0]``), ``problem`` says what is
    wrong with it and what is allowed, ``hint`` (often the nearest valid key) says what to do.
    """

    def __init__(self, path: str, problem: str, hint: str | None = None) -> None:
        self.path = path
        self.problem = problem
        self.hint = hint
        super().__init__(f"{path}: {problem}" + (f" {hint}" if hint else ""))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str, str | None]]:
        return (type(self), (self.path, self.problem, self.hint))


class BackendError(TlcoreError):
    """A backend is unknown, lacks a dependency, or its place cannot be written."""


class CaptureError(TlcoreError):
    """Capture was asked for something it cannot do, or (``on_error="raise"``) a write failed."""


def shareable(error: BaseException) -> str:
    """What may be logged of an error, or told to a client: only our own quote no secret for certain."""
    return str(error) if isinstance(error, BackendError) else type(error).__name__


class ReadError(TlcoreError):
    """A run, step or tensor cannot be read: missing, incomplete, foreign or damaged."""


class VerifyError(ReadError):
    """Stored bytes do not have the hash that ``step.json`` gives; ``bad`` names each one."""

    def __init__(self, bad: Sequence[str]) -> None:
        self.bad = list(bad)
        shown = "\n".join(f"  {line}" for line in self.bad[:20])
        more = f"\n  ... and {len(self.bad) - 20} more" if len(self.bad) > 20 else ""
        super().__init__(f"{len(self.bad)} damaged or missing:\n{shown}{more}")

    def __reduce__(self) -> tuple[type[VerifyError], tuple[list[str]]]:
        return (type(self), (self.bad,))
