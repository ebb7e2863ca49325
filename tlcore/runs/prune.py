"""Which runs of a directory may go: by age, by size, by being incomplete; never one that may be running."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from tlcore_backends.storage.leftovers import remove_run, stored_bytes

from ..errors import ReadError
from ..reader import Run, list_runs, open_run
from ..record import writer_is_running

# A run without an end mark that did nothing for this long has crashed.
QUIET_S = 86400.0
Options = Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run that may be removed: its directory, state, start, bytes on the disk."""

    path: str
    run_id: str
    state: str
    created: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs to remove, oldest first, and those that the criteria meet but that may be running."""

    remove: list[Candidate]
    running: list[Candidate]


def plan(
    output_dir: str | os.PathLike[str],
    storage_options: Options = None,
    *,
    older_than_s: float | None = None,
    max_total: int | None = None,
    incomplete: bool = False,
) -> Plan:
    """The runs directly in ``output_dir`` that meet every criterion given.

    ``older_than_s``: created longer ago. ``incomplete``: without an end mark. ``max_total``: of these,
    the oldest, until all runs that are left take at most so many bytes. A run that may still be written
    is kept: its process lives on this machine, or nobody here can tell (it runs elsewhere, or has several
    ranks) and it was active within a day. Runs that cannot be read and symbolic links are left alone.
    Raises ReadError and BackendError as `list_runs` does.
    """
    now = datetime.now(timezone.utc)
    remove: list[Candidate] = []
    running: list[Candidate] = []
    total = 0
    for summary in list_runs(output_dir, storage_options):
        # What a symbolic link leads to is not in this directory.
        if summary.problem is not None or os.path.islink(summary.path):
            continue
        size = stored_bytes(summary.path, storage_options)
        total += size
        created = _time(summary.created)
        if older_than_s is not None and (created is None or (now - created).total_seconds() <= older_than_s):
            continue
        if incomplete and summary.state == "complete":
            continue
        candidate = Candidate(summary.path, summary.run_id, summary.state, summary.created, size)
        try:
            kept = summary.state != "complete" and _may_be_running(
                open_run(summary.path, storage_options), now
            )
        except ReadError:
            # Somebody else has removed it since it was listed.
            continue
        (running if kept else remove).append(candidate)
    return Plan(_oldest(remove, total, max_total), running)


def remove(candidate: Candidate, storage_options: Options = None) -> None:
    """Remove a run. Raises BackendError as the place does."""
    remove_run(candidate.path, storage_options)


def _oldest(candidates: list[Candidate], total: int, max_total: int | None) -> list[Candidate]:
    if max_total is None:
        return candidates
    chosen = []
    for candidate in candidates:
        if total <= max_total:
            break
        chosen.append(candidate)
        total -= candidate.bytes
    return chosen


def _may_be_running(run: Run, now: datetime) -> bool:
    running = writer_is_running(run.document)
    # run.json names the process of rank 0 alone: others may write on when it has ended.
    if running or (running is False and run.world_size == 1):
        return running
    active = _last_activity(run)
    return active is None or (now - active).total_seconds() < QUIET_S


def _last_activity(run: Run) -> datetime | None:
    """When the last step that some rank has committed ended, or else when the run began."""
    times = [_time(run.created)]
    steps = run.stored.all_ranks()
    # Ranks count their steps by themselves, and the newest step may still be on its way.
    unknown = frozenset[int]().union(*{ranks.committed for _, ranks in steps})
    for number, ranks in reversed(steps):
        # A long run has very many steps, of which only the last of each rank is opened.
        if unknown.isdisjoint(ranks.committed):
            continue
        with contextlib.suppress(ReadError):
            documents = run.step(number).documents
            times += [_time(str(document.get("ended", ""))) for document in documents.values()]
            unknown -= ranks.committed
        if not unknown:
            break
    known = [time for time in times if time is not None]
    return max(known, default=None)


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)
