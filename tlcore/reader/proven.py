"""Tensors of a run on this machine that its source proves sound while it reads or moves many at once.

What it cannot prove is read one by one, which tells what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..alike import Move
from ..errors import ReadError
from ..protocols import Buffer
from .stored import Stored

_Read = Callable[[], Sequence[Buffer] | None]


def sound_read(stored: Stored, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]) -> _Read:
    """What `SupportsReadSound` gives; of a source that is none, what gives None."""
    proving, read = stored.can.proving, None
    if proving is not None:
        with suppress(ReadError), stored.asking():
            read = proving.sound_read(records, known)
    return partial(_asked, stored, read)


def _asked(stored: Stored, read: _Read | None) -> Sequence[Buffer] | None:
    with suppress(ReadError), stored.asking():
        return None if read is None else read()
    return None


def sound_move(
    stored: Stored, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
) -> Move | None:
    """What `SupportsMoveSound` gives; None of a source that is none."""
    moving = stored.can.moving
    if moving is not None:
        with suppress(ReadError), stored.asking():
            return moving.sound_move(records, known)
    return None
