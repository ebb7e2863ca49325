"""The parts of a zip archive, as `torch.save` and `numpy.savez` write it."""

from __future__ import annotations

import struct
from typing import Any

END = struct.Struct("<4s4H2IH")
ENTRY = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
LOCATOR = struct.Struct("<4sIQI")
WIDE_END = struct.Struct("<4sQHHIIQQQQ")
# Stands for a number that 32 bits are too few for.
ZIP64 = 0xFFFFFFFF


class PtError(ValueError):
    """The bytes are no ``.pt`` file of one plain tensor; the message says why."""


def unpack(form: struct.Struct, view: memoryview, at: int, magic: bytes) -> tuple[Any, ...]:
    """The fields of the part at ``at``. Raises PtError where it is none."""
    if not 0 <= at <= len(view) - form.size:
        raise PtError("not a zip archive (torch before 1.6 wrote none), or it ends too early")
    fields = form.unpack_from(view, at)
    if fields[0] != magic:
        raise PtError("not a zip archive (torch before 1.6 wrote none), or a damaged one")
    return fields


def wide(extra: memoryview, values: list[int]) -> list[int]:
    """Sizes and offset of an entry, from its zip64 field where 32 bits are too few."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + size]
        if kind == 1:
            count = min(size, len(field)) // 8
            told = iter(struct.unpack(f"<{count}Q", field[: count * 8]))
            values = [next(told, value) if value == ZIP64 else value for value in values]
        position += 4 + size
    return values
