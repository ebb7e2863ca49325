"""`tlcore ls --follow`: the steps of a running capture, as they are committed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ..errors import BackendError, ReadError
from ..reader import Run
from ..record import writer_is_running

Line = Callable[[int], str]


def follow(opened: Run, line: Line, end: Callable[[], str], pause_s: float) -> int:
    """Print a line for each step that is committed, until the run is closed or its process has ended.

    ``end`` gives the last line. Returns the exit status: 0 for a run that was closed, 1 for one that nobody
    will close any more. While its place does not answer it waits, and says so once on stderr.
    """
    shown: set[int] = set()
    answers = True
    while True:
        try:
            status = _look(opened, line, end, shown)
            if status is not None:
                return status
            answers = True
        except (BackendError, ReadError) as error:
            if not isinstance(error.__cause__ or error, BackendError):
                raise
            if answers:
                print(f"{error}; trying again", file=sys.stderr, flush=True)
            answers = False
        time.sleep(pause_s)
        _refresh(opened)


def _look(opened: Run, line: Line, end: Callable[[], str], shown: set[int]) -> int | None:
    """Print what was committed since the last look; the exit status where nothing more comes."""
    # Looked at before the steps: what was committed until it ended is printed, too.
    state, writer_runs = opened.state, _may_be_written(opened)
    if state != "complete" and not writer_runs:
        opened.refresh()
        state = opened.state
    for number in opened.steps:
        if number not in shown:
            print(line(number), flush=True)
            shown.add(number)
    if state != "complete" and writer_runs:
        return None
    print(end(), flush=True)
    return 0 if state == "complete" else 1


def _refresh(opened: Run) -> None:
    try:
        opened.refresh()
    except (ReadError, BackendError):
        # run.json is being written, or the place does not answer just now: what is there is shown later.
        return


def _may_be_written(opened: Run) -> bool:
    """False where this machine can tell that nobody writes the run any more."""
    return opened.world_size > 1 or writer_is_running(opened.document) is not False
