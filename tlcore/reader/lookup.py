"""Finding a tensor by name: also by one without the device, and the reason where none is stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..errors import MissingError, ReadError, missing
from ..layout.directions import direction_of
from ..layout.names import rank_of, stem
from ..layout.row_scale import presented_node
from ..ledger import CHANNELS_ONLY
from ..record import Json
from ..statistics.summary import KEYS
from .described import is_sound, tensors_in
from .documents import is_tensor_name
from .stored import Stored

# What rank 0 puts at the end of a tensor's name: its device, with the rank where the index says another one.
_DEVICE = re.compile(r"(.+?)_[a-z]+(?:_0|_[1-9][0-9]*_rank_0)?(?:~[0-9]+)?")
_MOST_NAMED = 5


def without_device(names: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """The names of rank 0's tensors by what they are without the device: ``step_0/layers.0/outputs``."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _DEVICE.fullmatch(name):
            found.setdefault(match[1], []).append(name)
    return found


def not_one(name: str, meant: Sequence[str], names: Sequence[str], where: str) -> MissingError:
    """The error for a name that no stored tensor has, and none or several (``meant``) without the device."""
    if meant:
        listed = " or ".join(map(repr, meant[:_MOST_NAMED]))
        return MissingError(f"{where}: no tensor {name!r}; did you mean {listed}?")
    call = f"{name.rpartition('/')[0]}/"
    # Those of the same call are nearer than any other, however alike the names are.
    own = [each for each in names if each.startswith(call)]
    return missing("tensor", name, where, own or names)


def unstored(stored: Stored, name: str) -> Json | None:
    """What the structure of its call says of a tensor that was not stored, None where it says nothing.

    ``name`` may leave out the device. The entry has the full ``name``, the reason why it was ``skipped``,
    ``dtype``, ``shape``, ``device``, and ``stats`` where they were kept. Raises ReadError for a damaged
    structure.
    """
    found = [
        entry for rank in sorted({0, rank_of(f"{name}.pt")}) for entry in _unstored_by(stored, name, rank)
    ]
    exact = [entry for entry in found if entry["name"] == name]
    if not exact:
        short = without_device(entry["name"] for entry in found).get(name, ())
        exact = [entry for entry in found if entry["name"] in short]
    return exact[0] if len(exact) == 1 else None


def _unstored_by(stored: Stored, name: str, rank: int) -> Iterator[Json]:
    """The tensors that a rank described and did not store, of the call and direction that a name says."""
    if not is_tensor_name(name):
        return
    call, _, last = name.rpartition("/")
    step, _, directory = call.partition("/")
    number, begin = int(step.removeprefix("step_")), f"{directory}/"
    files = [each for each in stored.structure_names(number, rank) if each.startswith(begin)]
    direction = direction_of(last, (each.removeprefix(begin).removesuffix(".json") for each in files))
    if direction is None:
        return
    file = f"{begin}{direction}.json"
    for path, node in tensors_in(stored.structure(number, rank, file)):
        if "file" in node:
            continue
        own = node.get("name", f"{call}/{stem(direction, path, node['device'], rank)}")
        shown = presented_node(node)
        entry = {"name": str(own), "skipped": node["skipped"], "dtype": shown["dtype"].removeprefix("torch.")}
        entry |= {"shape": shown["shape"], "device": node["device"]}
        if "stats" in node:
            if not is_sound(node["stats"]):
                raise ReadError(f"{stored.url}/{step}/{file}: damaged statistics")
            entry["stats"] = {key: node["stats"][key] for key in KEYS}
        yield entry


def not_stored(entry: Json, where: str) -> MissingError:
    """The error for a tensor that was described but not stored."""
    name, reason = entry["name"], entry["skipped"]
    if reason == CHANNELS_ONLY.reason:
        own = name.partition("/")[2]
        kept = f"only statistics for each channel were kept; run.channels({own!r}) has them"
        return MissingError(f"{where}: {name!r} was not stored, {kept}")
    if "stats" not in entry:
        return MissingError(f"{where}: {name!r} was not stored ({reason})")
    kept = f"only its statistics were kept ({reason}); run.stats({name!r}) has them"
    return MissingError(f"{where}: {name!r} was not stored, {kept}")
