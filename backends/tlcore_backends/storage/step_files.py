"""What formats with a directory for each step have in common: which steps there are, and their documents."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tlcore.errors import BackendError, ReadError
from tlcore.hotpath.beneath import read_texts
from tlcore.layout.checksums import has_checksum, without_checksum
from tlcore.layout.names import rank_of, rank_suffix, step_dir
from tlcore.layout.run_files import LARGEST_JSON, RunFiles, parse
from tlcore.protocols import StepRanks
from tlcore.record import Json
from tlcore.storage import SupportsLevels

_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]*)/")
_STEP_FILE = re.compile(r"step_(?:0|[1-9][0-9]*)/step(?:_rank_([1-9][0-9]*))?\.json")
# Documents that wait to be asked for, of steps that are looked at together.
_MOST_PARSED = 8


class StepFiles(Mapping[int, StepRanks]):
    """The steps of a run, found in its listing; a step that is asked for alone costs the listing of its own.

    ``run`` is the content of ``run.json``.
    """

    def __init__(self, files: RunFiles, run: Json) -> None:
        self._files = files
        self._alone: dict[int, StepRanks] = {}
        # Those that were read, and have no checksum.
        self.unchecked: set[str] = set()
        self._parsed: dict[tuple[int, int], Json] = {}
        # Only engines that step by themselves differ in what they have begun.
        places = run.get("ranks")
        self._several = isinstance(places, list) and any(
            isinstance(place, dict) and place.get("dp_size") != 1 for place in places
        )

    def document(self, step: int, rank: int) -> Any:
        """A rank's ``step.json``. Raises MissingError or ReadError, also for one that was changed since."""
        parsed = self._parsed.pop((step, rank), None)
        if parsed is not None:
            return parsed
        data = self.text(step, rank)
        where = f"{self._files.url}/{self.name(step, rank)}"
        self.note(data, step, rank)
        return without_checksum(parse(data, where))

    def hand_over(self, rank: int, step: int, document: Json) -> None:
        """Keep a document that somebody has parsed, and noted, for who asks for it next; few at a time."""
        if len(self._parsed) >= _MOST_PARSED:
            self._parsed.clear()
        self._parsed[step, rank] = without_checksum(document)

    def note(self, data: bytes, step: int, rank: int) -> None:
        """Look whether a ``step.json`` has its checksum. Raises ReadError where it was changed since."""
        name = self.name(step, rank)
        if not has_checksum(data, f"{self._files.url}/{name}"):
            self.unchecked.add(name)

    def text(self, step: int, rank: int) -> bytes:
        """The bytes of a rank's ``step.json``. Raises MissingError or ReadError."""
        (text,) = self.texts([step], rank)
        return self._files.json_bytes(self.name(step, rank)) if text is None else text

    def texts(self, steps: Sequence[int], rank: int) -> Sequence[bytes | None]:
        """The bytes of several ``step.json`` on this machine; None for each that is to be asked for alone."""
        directory = self._files.directory
        if directory is None:
            return [None] * len(steps)
        return read_texts(directory, [self.name(step, rank) for step in steps], LARGEST_JSON)

    def name(self, step: int, rank: int) -> str:
        """The name of a rank's ``step.json``."""
        return f"{step_dir(step)}/step{rank_suffix(rank)}.json"

    @cached_property
    def _all(self) -> Mapping[int, StepRanks]:
        # Only engines that step by themselves need to know whose the other files are.
        return self._in(self._files.sizes if self._several else self._directly())

    def _directly(self) -> Iterator[str]:
        """The files that lie directly in a step's directory; any of a step that has none there."""
        store = self._files.store
        if self._files.is_listed or not (self._files.is_local and isinstance(store, SupportsLevels)):
            yield from self._files.sizes
            return
        try:
            for directory in store.level().directories:
                if _STEP_NAME.match(f"{directory}/"):
                    direct = [entry.name for entry in store.level(directory).blobs]
                    yield from direct or self._files.sizes_in(directory)
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error

    def _in(self, names: Iterable[str]) -> dict[int, StepRanks]:
        committed: dict[int, set[int]] = {}
        begun: dict[int, set[int]] = defaultdict(set)
        for name in names:
            if begin := _STEP_NAME.match(name):
                ranks = committed.setdefault(int(begin[1]), set())
                if marker := _STEP_FILE.fullmatch(name):
                    ranks.add(int(marker[1] or 0))
                if self._several:
                    begun[int(begin[1])].add(rank_of(name))
        return {
            step: StepRanks(frozenset(ranks), frozenset(begun.get(step, ())))
            for step, ranks in sorted(committed.items())
        }

    def __getitem__(self, step: int) -> StepRanks:
        if "_all" in self.__dict__ or self._files.is_listed or type(step) is not int or step < 0:
            return self._all[step]
        # Looking at this step alone is enough.
        if step not in self._alone:
            self._alone |= self._in(self._files.sizes_in(step_dir(step)))
        return self._alone[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
