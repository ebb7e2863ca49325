"""Which steps a run in segments has: from the names of its indexes, or the catalogues of a closed run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, ItemsView, Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import groupby, repeat
from operator import itemgetter
from typing import Any

from tlcore.errors import BackendError, MissingError, ReadError
from tlcore.layout.checksums import has_checksum
from tlcore.layout.run_files import parse
from tlcore.protocols import StepRanks
from tlcore.record import Json
from tlcore.storage import Store

from .json_files import read_bytes
from .segment_names import DIRECTORY, IndexName, catalogue_name, is_data, parse_index_name

# Of a run with more ranks, one listing tells more than so many catalogues.
_MOST_CATALOGUES = 64
_LARGEST_SIZE = 1 << 50
# So many steps are believed of a few names. For more, the indexes must be large enough to have them.
_BELIEVED = 1 << 20
# Of a step in an index: a number of one digit and a comma in each column that every index has.
_LEAST_BYTES_A_STEP = 14
_MOST_STEPS = 1 << 26


class Listing:
    """The indexes that there are, by rank, in the order of their numbers; and the data files' sizes.

    ``ledgers`` has the final ledger of each rank whose catalogue was read, ``unchecked`` the catalogues
    without a checksum.
    """

    def __init__(
        self,
        indexes: Iterable[IndexName],
        sizes: Mapping[str, int],
        ledgers: Mapping[int, Any],
        unchecked: Collection[str] = (),
    ) -> None:
        self.sizes = sizes
        self.ledgers = ledgers
        self.unchecked = unchecked
        by_rank: dict[int, list[IndexName]] = {}
        for index in sorted(indexes, key=lambda each: (each.rank, each.number)):
            by_rank.setdefault(index.rank, []).append(index)
        self.by_rank = {rank: _ascending(each) for rank, each in by_rank.items()}
        self._firsts = {rank: [index.steps[0] for index in each] for rank, each in self.by_rank.items()}

    def find(self, step: int, rank: int) -> IndexName | None:
        """The index that commits a rank's step."""
        position = bisect_right(self._firsts.get(rank, []), step) - 1
        if position < 0:
            return None
        index = self.by_rank[rank][position]
        steps = index.steps
        if isinstance(steps, range):
            return index if step in steps else None
        place = bisect_right(steps, step) - 1
        return index if place >= 0 and steps[place] == step else None

    @property
    def steps(self) -> Steps:
        """The steps, with the ranks that have them."""
        return Steps(self)


class Steps(Mapping[int, StepRanks]):
    """A lazy mapping: looking for one step costs the same in a long run as in a short one."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._known: dict[frozenset[int], StepRanks] = {}

    def __getitem__(self, step: int) -> StepRanks:
        if type(step) is not int:
            raise KeyError(step)
        ranks = frozenset(
            rank for rank in self._listing.by_rank if self._listing.find(step, rank) is not None
        )
        if not ranks:
            raise KeyError(step)
        return self._ranks(ranks)

    def _ranks(self, ranks: frozenset[int]) -> StepRanks:
        return self._known.setdefault(ranks, StepRanks(ranks, ranks))

    def __iter__(self) -> Iterator[int]:
        chains = [_chained(indexes) for indexes in self._listing.by_rank.values()]
        if len(chains) == 1:
            return chains[0]
        return (step for step, _ in groupby(merge(*chains)))

    def items(self) -> ItemsView[int, StepRanks]:
        """The steps with their ranks; none is looked for."""
        return _Items(self)

    def each(self) -> Iterator[tuple[int, StepRanks]]:
        """The same, in order."""
        chains = [zip(_chained(indexes), repeat(rank)) for rank, indexes in self._listing.by_rank.items()]
        if len(chains) == 1:
            (rank,) = self._listing.by_rank
            return zip(_chained(self._listing.by_rank[rank]), repeat(self._ranks(frozenset((rank,)))))
        together = groupby(merge(*chains), itemgetter(0))
        return ((step, self._ranks(frozenset(rank for _, rank in ranks))) for step, ranks in together)

    def __len__(self) -> int:
        by_rank = list(self._listing.by_rank.values())
        if len(by_rank) == 1:
            return sum(len(index.steps) for index in by_rank[0])
        return sum(1 for _ in self)


class _Items(ItemsView[int, StepRanks]):
    def __init__(self, steps: Steps) -> None:
        super().__init__(steps)
        self._steps = steps

    def __iter__(self) -> Iterator[tuple[int, StepRanks]]:
        return self._steps.each()


def _chained(indexes: list[IndexName]) -> Iterator[int]:
    for index in indexes:
        yield from index.steps


def _ascending(indexes: list[IndexName]) -> list[IndexName]:
    """Without indexes whose steps others have already: nobody writes such."""
    found: list[IndexName] = []
    for index in indexes:
        if not found or index.steps[0] > found[-1].steps[-1]:
            found.append(index)
    return found


def list_segments(store: Store, run: Mapping[str, Any]) -> Listing:
    """What a run has now: by one request for each rank that has closed it, else by a listing.

    Raises ReadError.
    """
    return _catalogued(store, run) or _listed(store)


def _listed(store: Store) -> Listing:
    indexes: list[IndexName] = []
    sizes: dict[str, int] = {}
    lengths: dict[str, int] = {}
    try:
        for entry in store.list(f"{DIRECTORY}/"):
            index = parse_index_name(entry.name)
            if index is not None:
                indexes.append(index)
                lengths[index.file] = entry.size
            elif is_data(entry.name):
                sizes[entry.name] = entry.size
    except (BackendError, OSError) as error:
        raise ReadError(str(error)) from error
    _check_claims(store.url, indexes, lengths)
    return Listing(indexes, sizes, {})


def _count(indexes: Iterable[IndexName]) -> int:
    return sum(len(index.steps) for index in indexes)


def _check_claims(url: str, indexes: Sequence[IndexName], lengths: Mapping[str, int]) -> None:
    """Raise ReadError where names say that there are very many steps, and the files cannot have them."""
    count = _count(indexes)
    if count <= _BELIEVED:
        return
    for index in indexes:
        if lengths[index.file] < _LEAST_BYTES_A_STEP * (len(index.steps) - 1):
            problem = f"has {lengths[index.file]} bytes, which {len(index.steps)} steps do not fit into"
            raise ReadError(f"{url}/{index.file}: damaged, it {problem}")
    if count > _MOST_STEPS:
        raise ReadError(f"{url}: {count} steps are more than can be read as one run ({_MOST_STEPS})")


def _catalogued(store: Store, run: Mapping[str, Any]) -> Listing | None:
    """What the catalogues of a closed run say.

    None where it is not closed, one is missing, or more is said than a few letters are believed.
    """
    world_size = run.get("world_size")
    if run.get("state") != "complete" or not isinstance(world_size, int) or world_size > _MOST_CATALOGUES:
        return None
    indexes: list[IndexName] = []
    sizes: dict[str, int] = {}
    ledgers: dict[int, Any] = {}
    unchecked: list[str] = []
    for rank in range(world_size):
        name = catalogue_name(rank)
        where = f"{store.url}/{name}"
        try:
            data = read_bytes(store, name)
        except MissingError:
            return None
        if not has_checksum(data, where):
            unchecked.append(name)
        document = parse(data, where)
        for entry in _segments(document, where):
            index = parse_index_name(str(entry.get("index")))
            if index is None or index.rank != rank:
                raise ReadError(f"{where}: damaged, it names {str(entry.get('index'))[:100]!r}")
            indexes.append(index)
            for file, size in _files(entry, where):
                sizes[file] = size
        ledgers[rank] = document.get("ledger")
    if _count(indexes) > _BELIEVED:
        # A listing tells the indexes' sizes as well.
        return None
    return Listing(indexes, sizes, ledgers, unchecked)


def _segments(document: Any, where: str) -> list[Json]:
    segments = document.get("segments") if isinstance(document, dict) else None
    if not isinstance(segments, list) or not all(isinstance(entry, dict) for entry in segments):
        raise ReadError(f"{where}: damaged, not a list of segments")
    return segments


def _files(entry: Json, where: str) -> Iterator[tuple[str, int]]:
    files = entry.get("files")
    for file in files if isinstance(files, list) else ():
        name, size = (file.get("file"), file.get("bytes")) if isinstance(file, dict) else (None, None)
        if (
            not isinstance(name, str)
            or not is_data(name)
            or type(size) is not int
            or not 0 <= size <= _LARGEST_SIZE
        ):
            raise ReadError(f"{where}: damaged, {str(file)[:100]} is no data file")
        yield name, size
