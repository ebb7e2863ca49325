"""Batches of a data set, by several processes, in an order that can be taken up where it was left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from ...errors import ReadError
from ...layout.checks import LARGEST_SIZE
from .dataset import BUFFER_BYTES, OrderedDataset, RowDataset
from .order import Plan
from .reading import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

_STATE_VERSION = 1
# The numbers of a state, which may come from anybody. A loader has a list for each stream.
_LIMITS = {
    "epoch": (0, LARGEST_SIZE),
    "seed": (0, LARGEST_SIZE),
    "streams": (1, 1 << 12),
    "window_bytes": (1, LARGEST_SIZE),
}
# What a state and the loader that takes it must have in common.
_FIXED = ("items", "data", "batch_size", "shuffle", "rank", "world_size", "drop_last")

Collate = Callable[["Sequence[Batch]"], Any]


class _Place(NamedTuple):
    """A batch: places ``[begin, end)`` of the order; whoever reads it reads on to ``stop``."""

    begin: int
    end: int
    stop: int


class Loader:
    """Batches of one epoch each time it is iterated over; every item comes once, over all ranks together.

    A batch is one dictionary of tensors ``[batch, ...]``; of whole requests, which differ in length, a list
    of dictionaries, or what ``collate`` makes of it. ``num_workers`` processes each read a part of the order
    of their own, and share ``buffer_bytes``. ``rank`` and ``world_size`` divide the items among the processes
    of a training: as many each, but for one; with ``drop_last`` as many whole batches each.

    `state_dict` tells what was handed out. A loader that is given it goes on there, with the same order also
    where it has another number of workers.
    """

    def __init__(
        self,
        data: RowDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        collate: Collate | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        if batch_size < 1 or num_workers < 0 or seed < 0 or not 0 <= rank < world_size or buffer_bytes < 1:
            given = f"batch_size={batch_size}, num_workers={num_workers}, seed={seed}, rank={rank}"
            raise ValueError(f"{given}, world_size={world_size}, buffer_bytes={buffer_bytes} make no sense")
        self.data, self.batch_size, self.num_workers = data, batch_size, num_workers
        self.shuffle, self.rank, self.world_size, self.drop_last = shuffle, rank, world_size, drop_last
        self.epoch = 0
        self._seed, self._collate = seed, collate
        self._streams = max(1, num_workers)
        self._window_bytes = max(1, buffer_bytes // (2 * self._streams))
        self._delivered = 0
        self._resumes = False
        # The newest iteration, which alone the state is of.
        self._turn: object = None

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order the next iteration has; each whole iteration goes on to the next by itself."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch} must not be negative")
        self.epoch, self._delivered, self._resumes, self._turn = epoch, 0, False, None

    def __len__(self) -> int:
        """How many batches an epoch has on this rank."""
        begin, end = self._own()
        return len(range(begin, end, self.batch_size))

    def _own(self) -> tuple[int, int]:
        """The places of the order that are this rank's."""
        count = len(self.data)
        if self.drop_last:
            own = count // self.world_size // self.batch_size * self.batch_size
            return self.rank * own, (self.rank + 1) * own
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def _places(self) -> list[_Place]:
        """The epoch's batches in order: one of each worker in turn, whose own lie side by side."""
        begin, end = self._own()
        count, streams = len(self), self._streams
        found: list[list[_Place]] = []
        first = 0
        for stream in range(streams):
            # The longer ones come first, so that the turns never change.
            last = first + count // streams + (stream < count % streams)
            stop = min(end, begin + last * self.batch_size)
            starts = range(begin + first * self.batch_size, stop, self.batch_size)
            found.append([_Place(at, min(at + self.batch_size, end), stop) for at in starts])
            first = last
        turns = range(max(map(len, found), default=0))
        return [stream[turn] for turn in turns for stream in found if turn < len(stream)]

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch; after `load_state_dict` those that are left of it."""
        if not self._resumes:
            self._delivered = 0
        self._resumes = False
        turn = self._turn = object()
        plan = Plan(self._seed if self.shuffle else None, self.epoch, self._window_bytes)
        ordered = OrderedDataset(self.data, plan)
        context = "spawn" if self.num_workers and not self.data.is_local else None
        batches = DataLoader(
            _Batches(ordered, self._collate),
            batch_size=None,
            sampler=self._places()[self._delivered :],
            num_workers=self.num_workers,
            # Connections do not survive a fork.
            multiprocessing_context=context,
            collate_fn=_as_it_is,
        )
        for batch in batches:
            self._delivered += self._turn is turn
            yield batch
        if self._turn is turn:
            self.epoch, self._delivered = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What to give `load_state_dict` of a loader of the same data set to go on behind the last batch."""
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "delivered": self._delivered,
            "seed": self._seed,
            "streams": self._streams,
            "window_bytes": self._window_bytes,
            **self._fixed(),
        }

    def _fixed(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in _FIXED[2:]}
        return {"items": len(self.data), "data": self.data.fingerprint, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, in the next iteration, where another loader was. Raises ReadError where that cannot be."""
        if not isinstance(state, Mapping):
            raise ReadError(f"{type(state).__name__} is no loader's state, which is a dictionary")
        if state.get("version") != _STATE_VERSION:
            raise ReadError(f"version {state.get('version')!r} of a loader's state is not known")
        for key, own in self._fixed().items():
            if state.get(key) != own:
                raise ReadError(
                    f"the state is of another loader: its {key} is {state.get(key)!r}, not {own!r}"
                )
        found = {key: _number(state, key, *_LIMITS[key]) for key in _LIMITS}
        delivered = _number(state, "delivered", 0, len(self))
        self.epoch, self._seed, self._delivered = found["epoch"], found["seed"], delivered
        self._streams, self._window_bytes = found["streams"], found["window_bytes"]
        self._resumes, self._turn = True, None


def _number(state: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = state.get(key)
    if type(value) is not int or not least <= value <= most:
        raise ReadError(f"the state is damaged: its {key} is {value!r}, no number from {least} to {most}")
    return value


class _Batches(Dataset[Any]):
    """The batches by their places."""

    def __init__(self, ordered: OrderedDataset, collate: Collate | None) -> None:
        self._ordered, self._collate = ordered, collate

    def __getitem__(self, place: _Place) -> Any:
        import torch

        parts = list(self._ordered.batches(*place))
        if self._ordered.data.ragged:
            items = [item for part in parts for item in part if not isinstance(item, str)]
            return items if self._collate is None else self._collate(items)
        tables = [part for part in parts if isinstance(part, dict)]
        if len(tables) == 1:
            return tables[0]
        return {name: torch.cat([each[name] for each in tables]) for name in tables[0]}


def _as_it_is(batch: Any) -> Any:
    return batch
