"""The running statistics for each channel that a run was captured with, over all of its steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ..errors import MissingError, ReadError, missing
from ..layout.run_files import RunFiles
from ..statistics.channel_file import CHANNEL_FILE, ChannelTables, decode
from ..statistics.channels import ChannelStatistics, merge_channels
from .unshard import Places, part_of

if TYPE_CHECKING:
    from .run import Run

# What stands at the end of a tensor's name: its device, and the rank where the device does not say it.
_DEVICE = re.compile(r"(.+?)_[a-z]+(?:_[0-9]+)?(?:_rank_[0-9]+)?(~[0-9]+)?")
_LARGEST_FILE = 4 << 30


class _Held(NamedTuple):
    rank: int
    name: str


class Channels(Mapping[str, ChannelStatistics]):
    """The statistics of each rank's tensors, by logical names without their step."""

    def __init__(self, files: RunFiles, world_size: int) -> None:
        """Of the ranks below ``world_size``: how many there should be is whatever the run says."""
        self._files = files
        self._world_size = world_size

    @cached_property
    def ranks(self) -> Mapping[int, ChannelTables]:
        """What each rank has gathered. Raises ReadError for a file that is damaged or too large."""
        return {rank: self._tables(name, self._read(name)) for rank, name in self._names}

    @property
    def files(self) -> Mapping[str, bytes]:
        """Each rank's file as it lies there. Raises ReadError as `ranks` does."""
        found = {name: self._read(name) for _, name in self._names}
        for name, data in found.items():
            self._tables(name, data)
        return found

    @property
    def _names(self) -> list[tuple[int, str]]:
        found = [
            (int(match[1] or 0), name) for name in self._files.top if (match := CHANNEL_FILE.fullmatch(name))
        ]
        return sorted((rank, name) for rank, name in found if rank < self._world_size)

    def _read(self, name: str) -> bytes:
        if self._files.top[name] > _LARGEST_FILE:
            raise ReadError(f"{self._files.url}/{name}: larger than any file of this kind")
        return self._files.read(name)

    def _tables(self, name: str, data: bytes) -> ChannelTables:
        try:
            return decode(data)
        except ValueError as error:
            raise ReadError(f"{self._files.url}/{name}: damaged, {error}") from None

    @cached_property
    def _held(self) -> Mapping[str, int]:
        return {name: rank for rank, found in self.ranks.items() for name in found.tables}

    def holders(self, name: str) -> Sequence[_Held]:
        """The tensors, one of each rank that has one, that a name without the device means."""
        plain = (((rank, each), _DEVICE.fullmatch(each)) for each, rank in self._held.items())
        return [_Held(*held) for held, match in plain if match and f"{match[1]}{match[2] or ''}" == name]

    def __getitem__(self, name: str) -> ChannelStatistics:
        if name not in self._held:
            raise missing("channel statistics of", name, self._files.url, self._held)
        return ChannelStatistics(self.ranks[self._held[name]].tables[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def channels_of(run: Run, channels: Channels, name: str) -> ChannelStatistics:
    """The statistics that a name, with or without the device, means; without, of all ranks' rows."""
    if not channels:
        kept = run.config.get("capture", "tensor")
        hint = f'it was captured with "capture": "{kept}"' if kept != "channels" else "no step was committed"
        raise MissingError(f"{run.url}: has no channel statistics; {hint}")
    if name in channels:
        return channels[name]
    held = channels.holders(name)
    if not held:
        raise missing("channel statistics of", name, run.url, channels)
    chosen = [each for each in held if _counts(run.ranks, held, each)]
    for each in chosen:
        if _is_part(run, channels, each):
            listed = ", ".join(each.name for each in held)
            raise ReadError(f"{run.url}: each rank has only a part of {name!r}; name one of {listed}")
    try:
        return merge_channels(channels[each.name] for each in chosen)
    except ValueError as error:
        raise ReadError(f"{run.url}: {name!r}: {error}") from None


def _counts(places: Places, held: Sequence[_Held], own: _Held) -> bool:
    """Whether a rank's rows are counted: ranks of one replica of a model all have the same."""
    if own.rank not in places:
        return True
    mine = places[own.rank]
    replica = [each.rank for each in held if places.get(each.rank, mine)["dp_rank"] == mine["dp_rank"]]
    return own.rank == min(replica)


def _is_part(run: Run, channels: Channels, held: _Held) -> bool:
    about = channels.ranks[held.rank].about[held.name]
    for number in run.steps:
        document = run.step(number).documents.get(held.rank)
        if document is not None:
            return part_of(document.get("sharding"), about) is not None
    return False


def problems_of(channels: Channels) -> list[str]:
    """What is wrong with the files, a line each."""
    try:
        _ = channels.ranks
    except ReadError as error:
        return [str(error)]
    return []
