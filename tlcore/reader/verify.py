"""Checking that what a step says it stored is there, whole and unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import ReadError
from ..layout.names import rank_suffix, step_dir
from ..record import Json
from .bulk import Payload, read_payloads
from .documents import children
from .stored import Stored

_HASH = "xxh3-128:"


def verify_step(stored: Stored, step: int, rank: int, on_tensor: Callable[[], None]) -> tuple[int, list[str]]:
    """How many tensors of a rank's step are sound, and a line for each problem.

    ``on_tensor`` is called after each tensor. Every tensor is read and hashed; the structures must be
    there, be JSON, and refer to stored tensors; what else a format can check, its source does.
    """
    try:
        document = stored.document(step, rank)
    except ReadError as error:
        return 0, [str(error)]
    sound, bad = 0, []
    for payload in read_payloads(stored, document["records"], keep=False):
        problem = _tensor_problem(stored, payload) if stored.is_hashed else payload.problem
        sound += problem is None
        if problem is not None:
            bad.append(problem)
        on_tensor()
    bad += stored.problems(step, rank)
    bad += _structure_problems(stored, step, rank, document)
    return sound, bad


def _tensor_problem(stored: Stored, payload: Payload) -> str | None:
    record = payload.record
    name, stated = str(record.get("file", record["name"])), record["hash"]
    if not stated.startswith(_HASH):
        return f"{name}: unknown hash {stated!r}"
    found = _HASH + payload.digest
    wrong = stored.misfit(record) or payload.problem
    return wrong or (None if found == stated else f"{name}: {found}, step.json says {stated}")


def _structure_problems(stored: Stored, step: int, rank: int, document: Json) -> Iterator[str]:
    records = document["records"]
    files = {f"{record['name']}.pt" for record in records}
    needed = {
        f"{str(record['name']).partition('/')[2].rpartition('/')[0]}/{record['direction']}.json"
        for record in records
    }
    for name in sorted(needed):
        try:
            dangling = [file for file in _files_in(stored.structure(step, rank, name)) if file not in files]
        except ReadError as error:
            yield str(error)
        else:
            shown = f"{step_dir(step)}/{name.removesuffix('.json')}{rank_suffix(rank)}.json"
            yield from (f"{shown}: refers to {file}, which is not in step.json" for file in dangling)


def _files_in(node: Json) -> Iterator[str]:
    """Every tensor file that a structure refers to."""
    if node["type"] == "tensor" and "file" in node:
        yield node["file"]
    for child in children(node):
        yield from _files_in(child)
