"""Record batches in files of a bounded size, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def write_parts(
    batches: Iterable[Any],
    most_bytes: int,
    path_of: Callable[[int], Path],
    opened: Callable[[Path], Any],
    **options: Any,
) -> list[Path]:
    """Write batches by writers of pyarrow, the next one where a file has ``most_bytes``; returns the files.

    ``options`` go to each ``write_batch``.
    """
    made: list[Path] = []
    writer: Any = None
    try:
        for batch in batches:
            if writer is None:
                made.append(path_of(len(made)))
                writer = opened(made[-1])
            writer.write_batch(batch, **options)
            if made[-1].stat().st_size > most_bytes:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    return made
