"""Runs where they lie: opening one, listing those of a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import BackendError, MissingError, ReadError
from ..layout.names import printable
from ..layout.run_files import LARGEST_JSON, RUN_FILE, RunFiles
from ..ledger import Counts
from ..locations import is_url, redact_url
from ..record import Json
from ..storage import Store, SupportsFiles, SupportsLevels
from .documents import check_run
from .foreign import is_file, not_recognised, open_foreign
from .opening import Below, below, local_directory, open_existing
from .run import OpenedAs, Options, Run, run_document

_MOST_LOOKED_AT = 1000
_RUN_BELOW = re.compile(r"[^/]+/run\.json")


def open_run(path: str | os.PathLike[str], storage_options: Options = None) -> Run:
    """The run whose directory (a path or any fsspec URL) is ``path``; only its ``run.json`` is read now.

    So is a dump of another tool (a directory or a file), which is recognised by what it holds and read in
    place. ``storage_options`` go to the URL's fsspec filesystem. Raises ReadError when there is nothing,
    something else, several runs, or a newer layout; BackendError when the URL cannot be opened.
    """
    store = None if is_file(path) else open_existing(path, storage_options)
    # Other processes, which may be elsewhere, open it again.
    text = os.fspath(path)
    opened_as = text if is_url(text) else os.path.abspath(os.path.expanduser(text)), storage_options
    if store is not None and _may_have(store, RUN_FILE):
        try:
            return Run(store, run_document(store), opened_as)
        except MissingError:
            pass
    found, near = open_foreign(path, store, storage_options)
    if found is not None:
        return _foreign_run(*found, opened_as)
    raise not_recognised(path, near) if store is None else _not_one_run(path, storage_options, near)


def _may_have(store: Store, name: str) -> bool:
    """Whether it is worth to ask for a file: the error for a missing one lists the directory for its hint."""
    return not isinstance(store, SupportsFiles) or os.path.lexists(store.path(name))


def _foreign_run(store: Store, document: Json, opened_as: OpenedAs) -> Run:
    run = Run(store, check_run(document, store.url), opened_as)
    # Made now, while the files by which it was recognised are still there for it.
    _ = run.stored.source
    return run


def is_run(path: str | os.PathLike[str], storage_options: Options = None) -> bool:
    """Whether a path or URL has a ``run.json``, or is a dump of another tool.

    Raises as `open_run` does when it cannot be looked at.
    """
    store = None if is_file(path) else open_existing(path, storage_options)
    if store is not None:
        try:
            RunFiles(store).read(RUN_FILE, 0, LARGEST_JSON + 1)
            return True
        except MissingError:
            pass
    return open_foreign(path, store, storage_options)[0] is not None


def near_dumps(path: str | os.PathLike[str], storage_options: Options = None) -> list[str]:
    """What is missing in a place that is nearly a dump of another tool; nothing for any other place."""
    store = None if is_file(path) else open_existing(path, storage_options)
    return open_foreign(path, store, storage_options)[1]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run of an ``output_dir``; ``problem`` says why it cannot be read, where it cannot.

    ``dropped`` and ``failed`` of the ``captured`` tensors were lost at capture and are not in the run. Of an
    ``injected`` one, results of another run stood in for some of its model's own.
    """

    run_id: str
    path: str
    state: str
    created: str
    steps: int
    tensors: int
    bytes: int
    problem: str | None = None
    captured: int = 0
    dropped: int = 0
    failed: int = 0
    injected: bool = False


def list_runs(output_dir: str | os.PathLike[str], storage_options: Options = None) -> list[RunSummary]:
    """The runs in a directory or at a URL, the newest last; damaged ones are listed with their problem.

    Raises ReadError when there is no such directory, BackendError when the URL cannot be opened.
    """
    directory = local_directory(output_dir)
    if directory is not None:
        children = sorted(child for child in directory.iterdir() if (child / RUN_FILE).is_file())
        summaries = [_summary(str(child), open_existing(child)) for child in children]
    else:
        summaries = [_summary(each.url, each) for each in _directories_in(output_dir, storage_options)]
    runs = [each for each in summaries if each is not None]
    return sorted(runs, key=lambda run: (run.created, run.run_id))


def _directories_in(output_dir: str | os.PathLike[str], storage_options: Options) -> list[Below]:
    """What lies directly below a remote directory, found without listing what it holds where that can be."""
    store = open_existing(output_dir, storage_options)
    try:
        if isinstance(store, SupportsLevels):
            names = {name.rpartition("/")[2] for name in store.level().directories}
        else:
            listed = (entry.name for entry in store.list())
            names = {name.partition("/")[0] for name in listed if _RUN_BELOW.fullmatch(name)}
    except (BackendError, OSError) as error:
        raise ReadError(str(error)) from error
    return [below(store, name) for name in sorted(names)]


def _summary(path: str, store: Store) -> RunSummary | None:
    """What a run's own documents say of it; None for what is none."""
    run_id, state, created, counts = path.rpartition("/")[2], "unreadable", "", Counts()
    steps, problem, injected = 0, None, False
    try:
        try:
            document = run_document(store)
        except MissingError:
            return None
        run = Run(store, document)
        run_id, state, created = run.id, run.state, run.created
        counts = run.ledger
        steps, injected = len(run.steps), run.injected is not None
    except ReadError as error:
        problem = str(error)
    return RunSummary(
        run_id,
        path,
        state,
        created,
        steps,
        counts.stored,
        counts.bytes_stored,
        problem,
        captured=counts.captured,
        dropped=counts.dropped,
        failed=counts.failed,
        injected=injected,
    )


def _oddities(path: str | os.PathLike[str]) -> Iterator[str]:
    """Why a directory of this machine may hold nothing that can be opened."""
    directory = local_directory(path)
    if directory is None:
        return
    with os.scandir(directory) as entries:
        found = [(each.name, each.is_symlink()) for each in islice(entries, _MOST_LOOKED_AT)]
    around = list(Path(os.path.abspath(directory)).parents)[:2]
    if above := [each for each in around if (each / RUN_FILE).is_file()]:
        yield f"it lies in the run {above[0]}: give that"
    links = sorted(name for name, is_link in found if is_link)
    if not found:
        yield "it is empty"
    elif links:
        shown = printable(", ".join(links[:3]))
        more = f" and {len(links) - 3} more" if len(links) > 3 else ""
        yield f"it has symbolic links ({shown}{more}), which are not followed: give the files themselves"


def _not_one_run(path: str | os.PathLike[str], storage_options: Options, near: Sequence[str]) -> ReadError:
    runs = list_runs(path, storage_options)
    where = redact_url(os.fspath(path))
    if not runs:
        hints = "".join(f"\n  {each}" for each in (*near, *_oddities(path)))
        text = f"not a run (it has no {RUN_FILE}), and no run lies directly in it"
        known = "" if near else "; nor is it a dump of another tool that is known"
        return ReadError(f"{where}: {text}{known}{hints}")
    shown = "".join(f"\n  {run.path} ({run.state}, {run.created})" for run in reversed(runs[-20:-1]))
    more = f"\n  ... and {len(runs) - 20} older ones" if len(runs) > 20 else ""
    held = f"{where}: holds runs ({len(runs)}) and is none itself; give one of them"
    others = f"\nbefore it:{shown}{more}" if shown else ""
    return ReadError(f"{held}; the newest is {runs[-1].path}{others}")
