"""What one tool computes in one projection and another in several: vLLM's ``qkv_proj`` and ``gate_up_proj``.

The one result has those of the several side by side in its last dimension, and all take the same argument.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...reader.placements import as_whole, is_part
from .pairs import Columns, Key, Located

Parts = dict[Key, tuple[tuple[Key, Columns | None], ...]]
# By the name of a projection, those of the several.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
# Those whose parts are as wide, so that each rank has as much of both.
HALVES = ("gate_up_proj",)
_INTEGERS = ("int", "uint", "bool")
_Call = tuple[int, str, int]


def parts_of(fused: Mapping[Key, Located], single: Mapping[Key, Located]) -> Parts:
    """Of each fused projection's tensors, to which tensors of the single ones its columns belong."""
    calls = _by_call(fused), _by_call(single)
    found: Parts = {}
    for rank, module, call in calls[0]:
        outer, dot, name = module.rpartition(".")
        others = [(rank, f"{outer}{dot}{other}", call) for other in FUSED.get(name, ())]
        if not others or not all(each in calls[1] and each not in calls[0] for each in others):
            continue
        if (rank, module, call) not in calls[1]:
            sides = [calls[0][rank, module, call], *(calls[1][each] for each in others)]
            found.update(_results(fused, single, [side["outputs"] for side in sides]))
            found.update(_arguments([side["inputs"] for side in sides]))
    return found


def apart(source: Located, columns: Columns | None) -> Located:
    """A fused projection's tensor, of which only some columns count."""
    if columns is None:
        return source
    begin, end, total = columns
    record = source.records[0]
    # What is said of the whole is not said of a part.
    changed: dict[str, Any] = {
        "shape": [*record["shape"][:-1], end - begin],
        "bytes": int(record["bytes"]) // total * (end - begin),
        "hash": f"{record['hash']}[{begin}:{end}]" if record.get("hash") else record.get("hash"),
    }
    return replace(source, records=({**record, **changed},), columns=columns, whole=record)


def _by_call(found: Mapping[Key, Located]) -> dict[_Call, dict[str, list[Key]]]:
    """The floating tensors of each call, by direction."""
    calls: dict[_Call, dict[str, list[Key]]] = defaultdict(lambda: defaultdict(list))
    for key, source in found.items():
        record = source.records[0]
        if record["shape"] and not str(record["dtype"]).startswith(_INTEGERS):
            calls[key[:3]][key[3]].append(key)
    return calls


def _results(
    fused: Mapping[Key, Located], single: Mapping[Key, Located], keys: list[list[Key]]
) -> Iterator[tuple[Key, tuple[tuple[Key, Columns | None], ...]]]:
    if any(len(each) != 1 for each in keys):
        return
    whole, goals = keys[0][0], [each[0] for each in keys[1:]]
    widths = [_width(single[goal]) for goal in goals]
    # Of one that ranks have parts of, the whole is known for sure only when it is read.
    if fused[whole].unshard or _width(fused[whole]) == sum(widths):
        ends = [sum(widths[: place + 1]) for place in range(len(widths))]
        columns = [(end - width, end, ends[-1]) for end, width in zip(ends, widths, strict=True)]
        yield whole, tuple(zip(goals, columns, strict=True))


def _width(source: Located) -> int:
    """The columns of a tensor as it is compared: joined where ranks hold parts of it."""
    record = source.records[0]
    joined = source.unshard or is_part(record)
    return int((as_whole(record) if joined else record)["shape"][-1])


def _arguments(keys: list[list[Key]]) -> Iterator[tuple[Key, tuple[tuple[Key, Columns | None], ...]]]:
    if all(len(each) == 1 for each in keys):
        yield keys[0][0], tuple((each[0], None) for each in keys[1:])
