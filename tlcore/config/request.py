"""What a client chooses of the capture of its own request, as far as the operator allows it."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError, nearest
from ..layout.jsontext import parse_json
from ..layout.windows import Window, window_of
from .configuration import Config
from .validation import PathPart, coerce, each_problem, json_path, plain, show

# Where a request carries it, which the paths of errors begin with.
KEY = "tlcore"
KEYS = ("enabled", "modules", "rows", "deliver")
_LONGEST_TEXT = 1 << 15
# Each is looked for in the names of all modules, while an engine's requests wait.
_MOST_STARS = 64
_STARS = re.compile(r"\*+")
Rows = Literal["last"] | Window
ALL = Window()


@dataclass(frozen=True, slots=True)
class RequestChoice:
    """What one request says of its capture; a key that it does not give is None.

    ``enabled`` false leaves the request out, whatever else is said. `given` names the keys. With ``deliver``
    its client fetches what was captured of it.
    """

    enabled: bool | None = None
    modules: tuple[str, ...] | None = None
    rows: Rows | None = None
    deliver: bool | None = None

    @property
    def leaves_out(self) -> bool:
        """Whether nothing of the request is to be captured."""
        return self.enabled is False

    @property
    def given(self) -> tuple[str, ...]:
        """The keys that the request gives."""
        return tuple(key for key in KEYS if getattr(self, key) is not None)


def request_choice(value: Any) -> RequestChoice | None:
    """The choice in a mapping or JSON text; None where it says nothing.

    Raises ConfigError with the first problem, its path beginning with ``$.tlcore``.
    """
    # The front end and the worker look several times at what a client sends again and again.
    return _of_text(value) if isinstance(value, str) else _of(value)


@functools.lru_cache(maxsize=128)
def _of_text(value: str) -> RequestChoice | None:
    return _of(value)


def _of(value: Any) -> RequestChoice | None:
    document = coerce(plain(_document(value), (KEY,)), _schema())
    for problem in each_problem(document, _schema(), (KEY,)):
        raise problem
    if not document or document == {"deliver": False}:
        return None
    modules = document.get("modules")
    _check_stars(modules or ())
    return RequestChoice(
        document.get("enabled"),
        None if modules is None else tuple(modules),
        _rows(document.get("rows")),
        # Not to want it is to say nothing.
        document.get("deliver") or None,
    )


@functools.cache
def _schema() -> dict[str, Any]:
    import tlcore_schemas

    return tlcore_schemas.load("request.v1")


def _document(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise choice_error((), f"the text is longer than {_LONGEST_TEXT} characters.")
        try:
            value = parse_json(value)
        except ConfigError as error:
            raise choice_error((), error.problem) from None
    if not isinstance(value, Mapping):
        raise choice_error((), 'it must be a JSON object or its text, such as {"rows": "last"}.')
    return value


def _check_stars(modules: Collection[str]) -> None:
    count = sum(len(_STARS.findall(name)) for name in modules)
    if count > _MOST_STARS:
        problem = f"its names have {count} * together, more than {_MOST_STARS}."
        raise choice_error(("modules",), problem, "Name modules as a whole, or by fewer patterns.")


def _rows(given: Any) -> Rows | None:
    if given is None:
        return None
    if given == "last":
        return "last"
    try:
        return window_of(given)
    except ValueError as error:
        raise choice_error(("rows",), f"{error}.") from None


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the requests of a run may choose: some ``keys`` of a choice, within the run's ``rows``."""

    keys: tuple[str, ...] = ()
    rows: Rows = ALL

    @classmethod
    def of(cls, config: Config) -> Allowed:
        """What a configuration allows."""
        return cls(config.request_overrides + ("deliver",) * config.delivery, config.rows)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Allowed:
        """The same from `to_json`."""
        return cls(tuple(document["keys"]), _rows(document["rows"]) or ALL)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {"keys": list(self.keys), "rows": _shown(self.rows)}

    @property
    def _overrides(self) -> list[str]:
        return [key for key in self.keys if key != "deliver"]

    def refusal(self, choice: RequestChoice) -> ConfigError | None:
        """Why a request may not choose this; None where it may. Leaving it out is always allowed."""
        if choice.leaves_out:
            return None
        for key in choice.given:
            if key == "deliver" and key not in self.keys:
                problem = "nothing is delivered here; that is up to the operator (delivery)."
                return choice_error((key,), problem, "Leave it out.")
            if key not in self.keys:
                problem = f"no request may choose it here: request_overrides is {show(self._overrides)}."
                hint = 'Leave it out, or give "enabled": false to leave the request out.'
                return choice_error((key,), problem, hint)
        both = (choice.rows, self.rows)
        if "last" in both and both[0] not in (None, ALL, self.rows) and self.rows != ALL:
            problem = f"the rows {show(_shown(self.rows))} of this capture cannot be narrowed to these."
            return choice_error(("rows",), problem, "Leave the key out.")
        return None


def _shown(rows: Rows) -> Any:
    return rows if rows == "last" else rows.to_json()


def unknown_module(place: int, wanted: str, known: Collection[str]) -> ConfigError:
    """The error for one of the ``modules`` that is none of those which a run captures."""
    near = nearest(wanted, sorted(known))
    hint = f"Did you mean {show(near[0])}?" if near else "Names are whole; * stands for any characters."
    return choice_error(("modules", place), f"{show(wanted)} is no module that is captured.", hint)


def choice_error(inside: tuple[PathPart, ...], problem: str, hint: str | None = None) -> ConfigError:
    """The error of something ``inside`` a request's choice."""
    return ConfigError(json_path((KEY, *inside)), problem, hint)
