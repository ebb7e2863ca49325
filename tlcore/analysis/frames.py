"""Results as pandas tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..record import Json


def data_frame(rows: Iterable[Json], figures: str) -> Any:
    """A `pandas.DataFrame` of JSON objects, the object under the key ``figures`` spread into columns.

    Raises ImportError without pandas.
    """
    import pandas

    return pandas.DataFrame([_spread(row, figures) for row in rows])


def _spread(row: Json, figures: str) -> Json:
    rest = {key: value for key, value in row.items() if key != figures}
    return {**rest, **(row[figures] or {})}
