"""Reading indexes: what the segments of a run have in common is parsed, and looked at, once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.run_files import MOST_VALUES, parse

from .array_places import Places
from .shared_arrays import ArraysText
from .stored_plans import KnownPlans

# Tables that are mostly the same in all segments; the arrays but for their places and hashes.
_TABLES = {b'"calls":': "calls", b'"structures":': "structures", b'"arrays":': "arrays"}
_PLANS = {b'"plans":': "plans", b'"extents":': "extents"}
_SHARED = {**_TABLES, **_PLANS}
_NAMES = frozenset(_SHARED.values())
_LONGEST_KEY = max(map(len, _SHARED))
# Texts that are remembered, and their bytes in all.
_MOST = 8
_MOST_BYTES = 8 << 20


@dataclass(slots=True)
class Common:
    """What is found out of one index, and holds of all whose tables differ in places and hashes alone."""

    plans: KnownPlans = field(default_factory=KnownPlans)
    # Of this one alone, for who must not hold all that is found out.
    token: object = field(default_factory=object)
    # By the layout: where the arrays lie, and pieces of them to be hashed.
    extents: dict[Any, Any] = field(default_factory=dict)
    layouts: dict[Any, Any] = field(default_factory=dict)
    # Heads of data files in which nothing was wrong.
    heads: dict[Any, bytes] = field(default_factory=dict)
    # What steps share that are read as a whole.
    pairs: dict[Any, Any] = field(default_factory=dict)
    plan_digests: dict[Any, bytes] = field(default_factory=dict)
    extent_digests: dict[Any, bytes] = field(default_factory=dict)

    def keep(self, known: dict[Any, Any], key: Any, value: Any) -> None:
        """Remember one of few."""
        if len(known) >= _MOST:
            known.clear()
        known[key] = value


class _Seen:
    """The tables of an index that was read."""

    def __init__(self, texts: Mapping[str, bytes], tables: Mapping[str, Any], nbytes: int) -> None:
        self.texts = texts
        self.tables = tables
        self.nbytes = nbytes
        self.commons: OrderedDict[tuple[bytes, bytes], tuple[Common, Any, Any]] = OrderedDict()
        self.places: Places | None = None
        self._arrays: ArraysText | None = None
        self._told = False

    def arrays_of(self, texts: Mapping[str, bytes]) -> Any:
        """The arrays of another index whose tables are the same but for places and hashes; else None."""
        if any(texts[key] != self.texts[key] for key in ("calls", "structures")) or self.places is None:
            return None
        if not self._told:
            # Of a run of one segment nobody asks.
            self._arrays = ArraysText.of(self.texts["arrays"], self.tables["arrays"], self.places)
            self._told = True
        return self._arrays and self._arrays.arrays(texts["arrays"], self.tables["arrays"])


class IndexReader:
    """Parses the texts of a run's indexes; threads may share one."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._lock = threading.Lock()

    def read(self, data: bytes, where: str) -> Read:
        """An index's document, and what it has in common with others. Raises ReadError as `parse` does."""
        cut = _cut(data)
        if cut is not None:
            try:
                return self._read(*cut, where, len(data))
            except _UnusualError:
                pass
        return Read(parse(data, where), Common())

    def _read(self, texts: Mapping[str, bytes], rest: Sequence[bytes], where: str, nbytes: int) -> Read:
        own = _members(rest, where)
        with self._lock:
            known = list(self._seen)
        for seen in reversed(known):
            arrays = seen.arrays_of(texts)
            if arrays is not None:
                common, plans = self._common(seen, texts, where)
                return Read({**own, **seen.tables, **plans, "arrays": arrays}, common)
        tables = {}
        for name in _TABLES.values():
            same = next((seen.tables for seen in known if seen.texts[name] == texts[name]), None)
            tables[name] = _table(texts, name, where) if same is None else same[name]
        seen = _Seen(texts, tables, nbytes)
        common, plans = self._common(seen, texts, where)
        return Read({**own, **tables, **plans}, common, seen)

    def _common(self, seen: _Seen, texts: Mapping[str, bytes], where: str) -> tuple[Common, dict[str, Any]]:
        key = texts["plans"], texts["extents"]
        with self._lock:
            found = seen.commons.get(key)
        if found is None:
            found = Common(), *(_table(texts, name, where) for name in _PLANS.values())
            with self._lock:
                seen.commons[key] = found
                while len(seen.commons) > _MOST:
                    seen.commons.popitem(last=False)
        return found[0], {"plans": found[1], "extents": found[2]}

    def remember(self, read: Read, places: Places) -> None:
        """Compare the indexes to come with one that made sense."""
        if read.seen is None or read.seen.nbytes > _MOST_BYTES:
            return
        read.seen.places = places
        with self._lock:
            self._seen.append(read.seen)
            while len(self._seen) > _MOST or sum(each.nbytes for each in self._seen) > _MOST_BYTES:
                self._seen.pop(0)


@dataclass(frozen=True, slots=True)
class Read:
    """An index that was parsed; ``seen`` is to be remembered."""

    document: Any
    common: Common
    seen: _Seen | None = None


class _UnusualError(Exception):
    """A text that is not divided as a capture writes it, or is no JSON."""


def _cut(data: bytes) -> tuple[dict[str, bytes], list[bytes]] | None:
    """The lines of the shared tables, and those of all other members, each ending in a comma.

    None where these tables are not all there.
    """
    if len(data) > MOST_VALUES or data[:1] != b"{" or data[-2:] != b"}\n":
        return None
    texts: dict[str, bytes] = {}
    rest = []
    # Each line is copied once: an index is large.
    lines = data.split(b"\n")[:-1]
    lines[0] = lines[0][1:]
    lines[-1] = lines[-1][:-1] + b","
    for line in lines:
        name = _SHARED.get(line[: line.find(b":", 0, _LONGEST_KEY) + 1])
        if line[-1:] != b",":
            return None
        if name is None:
            rest.append(line)
        elif texts.setdefault(name, line) is not line:
            return None
    return (texts, rest) if len(texts) == len(_SHARED) else None


def _members(lines: Sequence[bytes], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in lines:
        # Each by itself: what is whole by itself is a member of the object, and not of anything in it.
        name, value = _member(line, where)
        if name in found or name in _NAMES:
            raise _UnusualError
        found[name] = value
    return found


def _table(texts: Mapping[str, bytes], name: str, where: str) -> Any:
    found, value = _member(texts[name], where)
    if found != name:
        raise _UnusualError
    return value


def _member(line: bytes, where: str) -> tuple[str, Any]:
    try:
        found = parse(b"{" + line[:-1] + b"}", where)
    except ReadError:
        raise _UnusualError from None
    if not isinstance(found, dict) or len(found) != 1:
        raise _UnusualError
    return next(iter(found.items()))
