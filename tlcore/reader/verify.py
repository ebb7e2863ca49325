"""Checking that what a step says it stored is there, whole and unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import ReadError
from ..layout.names import rank_suffix
from ..record import Json
from .bulk import Payload, read_payloads
from .documents import LARGEST_JSON, children
from .files import RunFiles
from .shard_check import shard_problems

_HASH = "xxh3-128:"


def verify_step(
    files: RunFiles, step: str, rank: int, on_tensor: Callable[[], None]
) -> tuple[int, list[str]]:
    """How many tensors of a rank's step are sound, and a line for each problem.

    ``step`` is the step's directory; ``on_tensor`` is called after each tensor. Every tensor is read and
    hashed; the structures must be there, be JSON, and refer to stored tensors; shards must have their
    size; ``module_calls.txt`` must agree with ``step.json``.
    """
    suffix = rank_suffix(rank)
    try:
        document = files.step_document(f"{step}/step{suffix}.json")
    except ReadError as error:
        return 0, [str(error)]
    sound, bad = 0, []
    for stored in read_payloads(files, document["records"], keep=False):
        problem = _tensor_problem(files, stored)
        sound += problem is None
        if problem is not None:
            bad.append(problem)
        on_tensor()
    bad += shard_problems(files, document)
    bad += _structure_problems(files, step, suffix, document)
    return sound, bad


def _tensor_problem(files: RunFiles, stored: Payload) -> str | None:
    record = stored.record
    name, stated = str(record.get("file", record["name"])), record["hash"]
    if not stated.startswith(_HASH):
        return f"{name}: unknown hash {stated!r}"
    size = files.size(name)
    if "file" in record and size is not None and size != record.get("file_bytes"):
        return f"{name}: {size} bytes, step.json says {record.get('file_bytes')}"
    found = _HASH + stored.digest
    return stored.problem or (None if found == stated else f"{name}: {found}, step.json says {stated}")


def _structure_problems(files: RunFiles, step: str, suffix: str, document: Json) -> Iterator[str]:
    records = [record for record in document["records"] if isinstance(record, dict)]
    stored = {f"{record.get('name')}.pt" for record in records}
    needed = {
        f"{str(record.get('name')).rpartition('/')[0]}/{record.get('direction')}{suffix}.json"
        for record in records
    }
    for name in sorted(needed):
        try:
            dangling = [file for file in _files_in(files.structure(name)) if file not in stored]
        except ReadError as error:
            yield str(error)
        else:
            yield from (f"{name}: refers to {file}, which is not in step.json" for file in dangling)
    if "structures" in document:
        return
    try:
        calls = files.read(f"{step}/module_calls{suffix}.txt", 0, LARGEST_JSON).decode().splitlines()
    except (ReadError, UnicodeDecodeError) as error:
        yield str(error)
    else:
        if calls != document["calls"]:
            yield f"{step}/module_calls{suffix}.txt: differs from step.json"


def _files_in(node: Json) -> Iterator[str]:
    """Every tensor file that a structure refers to."""
    if node["type"] == "tensor" and "file" in node:
        yield node["file"]
    for child in children(node):
        yield from _files_in(child)
