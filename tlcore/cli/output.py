"""What long commands show while they work, and where their report goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import TlcoreError


@contextmanager
def progress(verb: str, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's standard error, to be called with how much is done and in all; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_text(text: str, output: str | None, append: bool = False) -> None:
    """Print a report, or write it to a file, or to its end. Raises TlcoreError when it cannot be written."""
    if output is None:
        sys.stdout.write(text)
        return
    try:
        with Path(output).open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise TlcoreError(f"{output}: cannot be written ({error.strerror})") from error
