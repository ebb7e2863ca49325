"""Rows of calls that mostly nobody captures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from ....layout.rows import Row


class LaterRows(Sequence[Row]):
    """Rows that are made when somebody looks at them."""

    def __init__(self, make: Callable[[], Sequence[Row]]) -> None:
        self._make = make

    @functools.cached_property
    def _made(self) -> Sequence[Row]:
        return self._make()

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._made)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self._made[index]
