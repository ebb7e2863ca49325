"""Rules of a comparison: tolerances by name, what must be there and what is left out, from a JSON file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tlcore_schemas

from ..config.patterns import check_regex
from ..config.validation import coerce, plain, problems
from ..errors import ConfigError
from ..layout.jsontext import parse_json
from ..layout.names import PathKey
from .details import Details
from .measure import Measures, Tolerance

RulesLike = str | os.PathLike[str] | Mapping[str, Any]
Patterns = tuple[re.Pattern[str], ...]
_DEPTH = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_ANY = float("inf")


@dataclass(frozen=True, slots=True)
class Rule:
    """How far tensors may be apart whose names fit ``match``; what is None does not matter.

    ``grow`` are the growths with depth, position and step.
    """

    match: re.Pattern[str]
    rel: float | None = None
    abs: float | None = None
    norm: float | None = None
    cosine: float | None = None
    ulp: int | None = None
    bitwise: bool = False
    grow: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def times(self, module: str, position: int | None, step: int) -> float:
        """How many times the tolerance holds in a module, up to a position, in a step."""
        found = _DEPTH.search(module)
        places = int(found[1]) if found else 0, position or 0, step
        return 1 + sum(growth * place for growth, place in zip(self.grow, places, strict=True))

    def tolerance(self, times: float) -> Tolerance:
        """That of each value. Without one, values that are NaN or infinite must agree all the same."""
        if self.rel is self.abs is None:
            return Tolerance(0.0, _ANY)
        return Tolerance((self.rel or 0.0) * times, (self.abs or 0.0) * times)

    def broken(self, measures: Measures, details: Details | None, times: float) -> str | None:
        """What of it does not hold, in words."""
        found = []
        if not measures.agrees:
            given = self.rel is not None or self.abs is not None
            what = "are beyond rel and abs" if given else "are NaN or infinite in one run alone"
            found.append(f"{measures.mismatched:.2%} of the values {what}")
        norm = measures.rel_l2
        if self.norm is not None and (norm is None or norm > self.norm * times):
            found.append(f"norm {_shown(norm)} > {self.norm * times:.3g}")
        least = None if self.cosine is None else 1 - (1 - self.cosine) * times
        alike = measures.cosine is None and not measures.max_abs
        if least is not None and not alike and (measures.cosine is None or measures.cosine < least):
            found.append(f"cosine {_shown(measures.cosine)} < {least:.6g}")
        ulps = None if details is None else details.ulps
        if self.ulp is not None and (ulps is None or ulps > self.ulp * times):
            found.append(f"{_shown(ulps)} ulp > {self.ulp * times:.3g}")
        if self.bitwise and not measures.bitwise:
            found.append("not equal bit by bit")
        return f"rule {self.match.pattern!r}: {', '.join(found)}" if found else None


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"


@dataclass(frozen=True, slots=True)
class Rulebook:
    """The rules of a file in their order."""

    tolerances: tuple[Rule, ...] = ()
    require: Patterns = ()
    leave_out: Patterns = ()

    def of(self, name: str) -> Rule | None:
        """The first tolerance that fits a tensor's name."""
        return next((rule for rule in self.tolerances if rule.match.search(name)), None)


def tensor_name(module: str, direction: str, path: Sequence[PathKey]) -> str:
    """The name that rules are searched in: without step, call and device."""
    return f"{module or '_root'}/{direction}" + "".join(f"_{key}" for key in path)


def fits(patterns: Patterns, name: str) -> bool:
    """Whether one of the patterns is found in a name."""
    return any(each.search(name) for each in patterns)


def rulebook(rules: RulesLike | None) -> Rulebook:
    """The rules of a mapping, or of a JSON file. Raises ConfigError for what is none."""
    if rules is None:
        return Rulebook()
    if isinstance(rules, Mapping):
        return _checked(rules, lambda path: path)
    name = os.fspath(rules)
    try:
        document = parse_json(Path(name).read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.path}", error.problem, error.hint) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError("--rules", f"{name} cannot be read: {reason}.") from None
    return _checked(document, lambda path: f"{name}: {path}")


def _checked(document: Any, where: Callable[[str], str]) -> Rulebook:
    schema = tlcore_schemas.load("rules.v1")
    if not isinstance(document, Mapping):
        raise ConfigError(where("$"), 'the rules must be a JSON object, such as {"leave_out": ["rotary"]}.')
    try:
        given = coerce(plain(document), schema)
        for at, each in enumerate(listed if isinstance(listed := given.get("tolerances"), list) else ()):
            # The schema can only say that it is too short.
            if isinstance(each, Mapping) and "match" in each and not each.keys() - {"match", "grow"}:
                raise ConfigError(f"$.tolerances[{at}]", 'no tolerance is given, such as "norm": 0.01.')
        for problem in problems(given, schema):
            raise problem
        return Rulebook(
            tuple(_rule(each, f"$.tolerances[{at}]") for at, each in enumerate(given.get("tolerances", ()))),
            *(_patterns(given, key) for key in ("require", "leave_out")),
        )
    except ConfigError as error:
        raise ConfigError(where(error.path), error.problem, error.hint) from None


def _rule(given: Mapping[str, Any], path: str) -> Rule:
    grow = given.get("grow", {})
    known = {key: value for key, value in given.items() if key not in ("match", "grow")}
    growth = tuple(float(grow.get(key, 0.0)) for key in ("depth", "position", "step"))
    match = check_regex(given["match"], f"{path}.match")
    return Rule(match, **known, grow=(growth[0], growth[1], growth[2]))


def _patterns(given: Mapping[str, Any], key: str) -> Patterns:
    return tuple(check_regex(text, f"$.{key}[{at}]") for at, text in enumerate(given.get(key, ())))
