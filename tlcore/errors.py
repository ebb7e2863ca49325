"""Every error tlcore raises on purpose, so that a caller can catch one base class."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice

# Looking for a name that was meant takes long among very many.
_MOST_COMPARED, _LONGEST_NAME = 5000, 500


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
        stop = "" if problem.endswith((".", ";", ":")) else "."
        super().__init__(f"{path}: {problem}" + (f"{stop} {hint}" if hint else ""))

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


class MissingError(ReadError, KeyError):
    """A run, step, call, tensor or file that is not there; also a KeyError, as mappings promise."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, with its line ends escaped.
        return str(self.args[0])


class VerifyError(ReadError):
    """Stored bytes do not have the hash that ``step.json`` gives; ``bad`` names each one."""

    def __init__(self, bad: Sequence[str]) -> None:
        self.bad = list(bad)
        shown = "\n".join(f"  {line}" for line in self.bad[:20])
        more = f"\n  ... and {len(self.bad) - 20} more" if len(self.bad) > 20 else ""
        super().__init__(f"{len(self.bad)} damaged or missing:\n{shown}{more}")

    def __reduce__(self) -> tuple[type[VerifyError], tuple[list[str]]]:
        return (type(self), (self.bad,))


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Those of the ``known`` names that may have been meant, the nearest first."""
    few = list(islice(known, _MOST_COMPARED))
    return difflib.get_close_matches(name[:_LONGEST_NAME], few, n=most, cutoff=0.5)


def missing(what: str, name: object, where: str, known: Iterable[str]) -> MissingError:
    """The error for a name that is not there, with the nearest ones that are."""
    near = nearest(str(name), known, 3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return MissingError(f"{where}: no {what} {str(name)!r}{hint}")
