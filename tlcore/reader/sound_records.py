"""Records that were found sound, and come again in every layer and step with other names and hashes."""

from __future__ import annotations

import marshal
from collections.abc import Hashable
from typing import Any

from ..layout.names import step_dir
from ..protocols import RecordKind
from .documents import is_tensor_name, record_problem

_MOST = 1 << 16
# What of a record may be any text, or is looked at here.
_TOLD = frozenset((str, int, list))
_OWN = dict.fromkeys(("name", "hash", "file", "alias_of", "module"))
_TWO_NUMBERS = [int, int]


class SoundRecords:
    """What is known here is exactly what was checked but for texts; all else is checked as it always is."""

    def __init__(self) -> None:
        self._forms: set[bytes] = set()
        self._names: set[str] = set()
        self._kinds: set[Hashable] = set()
        # The step of which records were asked for last, and how names in it begin.
        self._begin = -1, ""

    def problem(self, record: Any, number: int) -> str | None:
        """What `record_problem` says."""
        form = self._form(record, number)
        if form in self._forms:
            return None
        problem = record_problem(record, number)
        if problem is None and form:
            _add(self._forms, form)
        return problem

    def is_known(self, each: RecordKind, number: int) -> bool:
        """Whether a record is sound; the first of each kind is looked at."""
        if type(each.name) is not str or type(each.module) is not str or not self._is_name(each.name, number):
            return False
        if each.kind not in self._kinds:
            if record_problem(each.make(), number) is not None:
                return False
            _add(self._kinds, each.kind)
        return True

    def _is_name(self, name: str, number: int) -> bool:
        """Whether a tensor of the step may have this name; that the step's directory may is known."""
        step, begin = self._begin
        if step != number:
            begin = f"{step_dir(number)}/"
            # In one piece: other threads may ask for other steps.
            self._begin = number, begin
        if not name.startswith(begin):
            return False
        own = name[len(begin) :]
        if own not in self._names:
            if not is_tensor_name(name):
                return False
            _add(self._names, own)
        return True

    def _form(self, record: Any, number: int) -> bytes:
        """All of a record but what is looked at here, which is sound; empty where it is not, or cannot be."""
        # Unlike equality, what is marshalled tells 1 from 1.0 and from true; version 2 has no references.
        try:
            name = record["name"]
            if type(name) is not str or not self._is_name(name, number):
                return b""
            alias = record.get("alias_of")
            texts = type(record["hash"]) is type(record["module"]) is str
            if not texts or not (alias is None or type(alias) is str):
                return b""
            if "file" in record and record["file"] != f"{name}.pt":
                return b""
            if "place" not in record and "offsets" not in record:
                return marshal.dumps({**record, **_OWN}, 2)
            place = record.get("place")
            if type(place) is dict and _TOLD.issuperset(kinds := [*map(type, place.values())]):
                # Where in a file it lies, or its shard: another in each record. Lists are mostly alike.
                lists = place.values() if list in kinds else ()
                place = [
                    *place,
                    *[kind.__name__ for kind in kinds],
                    *[each for each in lists if type(each) is list],
                ]
            offsets = record.get("offsets")
            if type(offsets) is list and list(map(type, offsets)) == _TWO_NUMBERS:
                offsets = None
            return marshal.dumps({**record, **_OWN, "place": place, "offsets": offsets}, 2)
        except (AttributeError, KeyError, TypeError, ValueError):
            return b""


def _add(known: set[Any], value: Any) -> None:
    if len(known) >= _MOST:
        known.clear()
    known.add(value)
