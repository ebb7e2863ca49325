"""Tables for people: rich ones on a terminal, aligned plain text everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..layout.names import printable

__all__ = ["print_table", "printable", "size"]

_NUMBERS = frozenset({"step", "steps", "calls", "tensors", "bytes"})


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their columns; columns that hold numbers are aligned right."""
    texts = [[_text(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, texts)
    else:
        _print_plain(columns, texts)


def size(count: int) -> str:
    """A number of bytes with a binary unit: ``1.5 MiB``."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _text(cell: object) -> str:
    return "" if cell is None else printable(str(cell))


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for row in rows:
        # Plain text objects: a name with brackets is no markup.
        table.add_row(*map(Text, row))
    Console().print(table)


def _print_plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())
