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
from .skeletons import Skeletons, form_of
from .stored_plans import KnownPlans

# Tables that are mostly the same in all segments; the arrays but for their places and hashes.
_TABLES = {b'"calls":': "calls", b'"structures":': "structures", b'"arrays":': "arrays"}
_PLANS = {b'"plans":': "plans", b'"extents":': "extents"}
_SHARED = {**_TABLES, **_PLANS}
_NAMES = frozenset(_SHARED.values())
_LONGEST_KEY = max(map(len, _SHARED))
_COMMA = ord(",")
# Other members that are mostly the same in many segments.
_LASTING = (b'"layout":', b'"rank":', b'"rows":')
_SKELETONS = b'"skeletons":'
_MOST_MEMBERS, _MOST_MEMBERS_BYTES = 64, 1 << 20
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
    # Of data files whose heads are sound: how long these are, and their hashes.
    heads: dict[Any, Any] = field(default_factory=dict)
    # What steps share that are read as a whole.
    pairs: dict[Any, Any] = field(default_factory=dict)
    plan_digests: dict[Any, bytes] = field(default_factory=dict)
    extent_digests: dict[Any, bytes] = field(default_factory=dict)

    def keep(self, known: dict[Any, Any], key: Any, value: Any) -> None:
        """Remember one of few."""
        if len(known) >= _MOST:
            known.clear()
        known[key] = value


class _Texts:
    """The lines of an index that hold shared tables: nothing of it is copied that is as it was in another."""

    def __init__(self, data: bytes, places: Mapping[str, tuple[int, int]]) -> None:
        self._data = data
        self._places = places

    def __getitem__(self, name: str) -> bytes:
        begin, end = self._places[name]
        return self._data[begin:end]

    def view(self, name: str) -> memoryview:
        """A line where it lies."""
        begin, end = self._places[name]
        return memoryview(self._data)[begin:end]

    def has(self, name: str, text: bytes) -> bool:
        """Whether a line is this one."""
        begin, end = self._places[name]
        return end - begin == len(text) and self._data.startswith(text, begin)

    def copied(self) -> dict[str, bytes]:
        """All of them."""
        return {name: self[name] for name in self._places}


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

    def arrays_of(self, texts: _Texts) -> Any:
        """The arrays of another index whose tables are the same but for places and hashes; else None."""
        if self.places is None or not all(texts.has(key, self.texts[key]) for key in ("calls", "structures")):
            return None
        if not self._told:
            # Of a run of one segment nobody asks.
            self._arrays = ArraysText.of(self.texts["arrays"], self.tables["arrays"], self.places)
            self._told = True
        return self._arrays and self._arrays.arrays(texts.view("arrays"), self.tables["arrays"])


class IndexReader:
    """Parses the texts of a run's indexes; threads may share one."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        # Members that were parsed, by their lines or the forms of these, and the bytes of all.
        self._members: dict[bytes, tuple[str, Any]] = {}
        self._members_bytes = 0
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

    def _read(self, texts: _Texts, rest: Sequence[bytes], where: str, nbytes: int) -> Read:
        own: dict[str, Any] = {}
        for line in rest:
            # Each by itself: what is whole by itself is a member of the object, and not of anything in it.
            name, value = self._member(line, where)
            if name in own or name in _NAMES:
                raise _UnusualError
            own[name] = value
        with self._lock:
            known = list(self._seen)
        for seen in reversed(known):
            arrays = seen.arrays_of(texts)
            if arrays is not None:
                common, plans = self._common(seen, texts, where)
                return Read({**own, **seen.tables, **plans, "arrays": arrays}, common)
        tables = {}
        for name in _TABLES.values():
            same = next((seen.tables for seen in known if texts.has(name, seen.texts[name])), None)
            tables[name] = _table(texts, name, where) if same is None else same[name]
        seen = _Seen(texts.copied(), tables, nbytes)
        common, plans = self._common(seen, texts, where)
        return Read({**own, **tables, **plans}, common, seen)

    def _member(self, line: bytes, where: str) -> tuple[str, Any]:
        if line.startswith(_SKELETONS):
            form = form_of(line)
            return _member(line, where) if form is None else self._skeletons_of(line, form, where)
        if not line.startswith(_LASTING):
            return _member(line, where)
        with self._lock:
            known = self._members.get(line)
        if known is None:
            known = _member(line, where)
            self._remember_member(line, known)
        return known

    def _skeletons_of(self, line: bytes, form: bytes, where: str) -> tuple[str, Any]:
        """A table of skeletons; of one that is known but for texts nothing is parsed until it is needed."""
        with self._lock:
            name, known = self._members.get(form, ("", None))
        if known is not None:
            return name, Skeletons(lambda: _member(line, where)[1], len(known), known.known)
        name, value = _member(line, where)
        if name != "skeletons" or not isinstance(value, list):
            return name, value
        skeletons = Skeletons.of(value)
        self._remember_member(form, (name, skeletons))
        return name, skeletons

    def _remember_member(self, line: bytes, known: tuple[str, Any]) -> None:
        with self._lock:
            self._members_bytes += len(line)
            if len(self._members) >= _MOST_MEMBERS or self._members_bytes > _MOST_MEMBERS_BYTES:
                self._members.clear()
                self._members_bytes = len(line)
            self._members[line] = known

    def _common(self, seen: _Seen, texts: _Texts, where: str) -> tuple[Common, dict[str, Any]]:
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


def _cut(data: bytes) -> tuple[_Texts, list[bytes]] | None:
    """The lines of the shared tables, and those of all other members, each ending in a comma.

    None where these tables are not all there.
    """
    if len(data) > MOST_VALUES or data[:1] != b"{" or data[-2:] != b"}\n":
        return None
    places: dict[str, tuple[int, int]] = {}
    rest = []
    begin, last = 1, len(data) - 2
    while (end := data.find(b"\n", begin, last)) >= 0:
        if end == begin or data[end - 1] != _COMMA:
            return None
        name = _SHARED.get(data[begin : data.find(b":", begin, begin + _LONGEST_KEY) + 1])
        if name is None:
            rest.append(data[begin:end])
        elif places.setdefault(name, (begin, end)) != (begin, end):
            return None
        begin = end + 1
    # A table in the last line is no capture's: it is parsed as any other member is, and then refused.
    rest.append(data[begin:last] + b",")
    return (_Texts(data, places), rest) if len(places) == len(_SHARED) else None


def _table(texts: _Texts, name: str, where: str) -> Any:
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
