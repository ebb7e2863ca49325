"""Rewriting a stored run into another backend, without loss: there and back gives the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..config.configuration import Config
from ..engine.new_run import layout_of, make_sink
from ..engine.run_documents import RunDocuments, close_run
from ..errors import ConfigError, ReadError, VerifyError
from ..layout.names import rank_suffix
from ..layout.run_files import RUN_FILE, STEP_KEYS
from ..layout.templates import compact
from ..ledger import Counts, Ledger
from ..locations import absolute_location, is_url, redact_url
from ..protocols import Sink, SupportsLateCommit
from ..reader import MissingError, Run, Step, is_run
from ..reader.bulk import Payload, read_payloads
from ..reader.documents import FOREIGN
from ..reader.step import counts_of
from ..record import Json, Origin, Record, RunInfo, StepSummary
from ..registry import open_store, resolve
from ..storage import Location

# Records are handed over in batches: a remote place gets many at a time, the local disk what the cache holds.
_REMOTE_BATCH_BYTES = 64 << 20
_LOCAL_BATCH_BYTES = 16 << 20
# Records of small steps that are read together.
_MOST_TOGETHER = 8192


def convert(source: Run, config: Config, on_tensor: Callable[[], None] = lambda: None) -> str:
    """Write ``source`` into ``config.output_dir`` with ``config.backend``; returns the new run's URL.

    The run keeps its id. ``on_tensor`` is called after each tensor, whose hash is checked on the way.
    What fails half-way reads as an incomplete run. Raises ReadError for a run that is not complete or a
    place that already holds it, VerifyError for damage, ConfigError for a backend without a reader,
    BackendError when the place cannot be written.
    """
    if source.state != "complete":
        raise ReadError(f"{source.url}: the run is not complete, so it cannot be converted")
    backend = resolve(config.backend)
    if backend.written_as(config.backend_options) == backend.name and backend.source is None:
        problem = f"{backend.name!r} has no reader, so what convert wrote could not be read."
        raise ConfigError("$.backend", problem, "Register it with a source.")
    location = backend.located(config.backend_options, config.output_dir)
    url = f"{absolute_location(location.url).rstrip('/')}/{source.id}"
    if _is_taken(url, location.storage_options):
        raise ReadError(f"{redact_url(url)}: already holds a run; convert into another directory")
    document = {**source.document, "backend": backend.written_as(config.backend_options)}
    if document.pop(FOREIGN, None):
        document |= {"converted_from": source.document["backend"], "ledger": source.ledger_of(0).to_json()}
    for rank in reversed(range(source.world_size)):
        sink = make_sink(config)
        document["layout"] = layout_of(sink)
        run = RunInfo(source.id, url, rank, source.world_size, document, Ledger())
        _convert_rank(source, sink, RunDocuments(run, location), on_tensor)
    _restore_documents(source, url, location, document)
    return url


def _is_taken(url: str, storage_options: Mapping[str, Any] | None) -> bool:
    try:
        return is_run(url, storage_options)
    except MissingError:
        return False


def _convert_rank(source: Run, sink: Sink, documents: RunDocuments, on_tensor: Callable[[], None]) -> None:
    documents.open()
    run = documents.run
    sink.open(run)
    lost: list[BaseException] = []
    accepted: dict[int, Counts] = {}
    left = source.ledger_of(run.rank)

    def stored(step: int, error: BaseException | None) -> None:
        if error is not None:
            lost.append(error)
        counts = accepted.pop(step)
        run.ledger.add(counts)
        left.subtract(counts)

    if isinstance(sink, SupportsLateCommit):
        sink.tell_stored(stored)
    batch_bytes = _REMOTE_BATCH_BYTES if is_url(run.url) else _LOCAL_BATCH_BYTES
    for records, summary in _steps(source, run.rank, batch_bytes):
        for batch in _batches(records, batch_bytes):
            sink.write(batch)
            for _ in batch:
                on_tensor()
        accepted[summary.step] = summary.counts
        sink.commit_step(summary)
        if not isinstance(sink, SupportsLateCommit):
            stored(summary.step, None)
        if lost:
            break
    if isinstance(sink, SupportsLateCommit):
        sink.flush()
    # Of steps that the source does not have, and that the ledger counts.
    run.ledger.add(left)
    # What was told late is known when the sink is closed; without an end mark the run reads as incomplete.
    close_run(sink, documents, lambda: not lost)
    if lost:
        raise lost[0]


def _steps(source: Run, rank: int, window_bytes: int) -> Iterator[tuple[Iterator[Record], StepSummary]]:
    """Each step that a rank has: its records, to be used up before the next one's, and all else of it.

    Small steps are read together, as far as their bytes fit into ``window_bytes``.
    """
    for window in _windows(source, rank, window_bytes):
        entries = [entry for records, _ in window for entry in records]
        # Once a batch was handed on nobody looks at its bytes again.
        payloads = read_payloads(source.stored, entries, keep=True)
        for records, summary in window:
            own = itertools.islice(payloads, len(records))
            yield _records(own, summary.step, rank, hashed=not source.is_foreign), summary


def _windows(source: Run, rank: int, window_bytes: int) -> Iterator[list[tuple[list[Json], StepSummary]]]:
    """The records and all else of steps, a few small steps at a time, or a large one alone."""
    window: list[tuple[list[Json], StepSummary]] = []
    size = count = 0
    for step in source.values():
        if rank not in step.ranks:
            continue
        for problem in source.stored.problems(step.number, rank, thorough=False):
            raise ReadError(f"{source.url}: {problem}")
        records = step.documents[rank]["records"]
        nbytes = sum(record["bytes"] for record in records)
        if window and (size + nbytes > window_bytes or count + len(records) > _MOST_TOGETHER):
            yield window
            window, size, count = [], 0, 0
        window.append((records, summary_of(step, rank)))
        size, count = size + nbytes, count + max(1, len(records))
    if window:
        yield window


def _records(payloads: Iterable[Payload], step: int, rank: int, hashed: bool) -> Iterator[Record]:
    hashes: dict[str, Any] = {}
    for payload in payloads:
        record = _record(step, rank, payload, hashed)
        if record.alias_of is not None and hashes.get(record.alias_of) != record.hash:
            raise ReadError(f"step {step}: {record.name} is no alias of {record.alias_of!r}")
        hashes[record.name] = record.hash
        yield record


def _batches(records: Iterable[Record], batch_bytes: int) -> Iterator[list[Record]]:
    """Records in the order they were stored, about ``batch_bytes`` at a time."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.nbytes
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record(step: int, rank: int, stored: Payload, hashed: bool) -> Record:
    entry = stored.record
    if stored.problem is not None:
        raise ReadError(stored.problem)
    if hashed and entry["hash"] != f"xxh3-128:{stored.digest}":
        raise VerifyError([f"{entry['name']}: xxh3-128:{stored.digest}, step.json says {entry['hash']}"])
    origin = Origin(
        rank,
        entry["module"],
        entry["call"],
        entry["direction"],
        tuple(entry["path"]),
        getattr(torch, entry["dtype"]),
        tuple(entry["shape"]),
        entry["device"],
        compact(entry["placements"]) if "placements" in entry else "",
        str(entry.get("converted_from") or ""),
    )
    return Record(entry["name"], step, origin, stored.data, stored.digest, entry.get("alias_of"))


def summary_of(step: Step, rank: int) -> StepSummary:
    """All of a rank's step that is not tensor bytes, as the capture handed it over."""
    document = step.documents[rank]
    return StepSummary(
        step=step.number,
        rank=rank,
        calls=document["calls"],
        structures=step.structures(rank),
        counts=counts_of(document, f"step {step.number}"),
        started=str(document.get("started", "")),
        ended=str(document.get("ended", "")),
        rows=document.get("rows"),
        extra={key: value for key, value in document.items() if key not in STEP_KEYS},
    )


def _restore_documents(source: Run, url: str, location: Location, document: Json) -> None:
    """Put back what a new run cannot know: when the source was closed, and with which ledger."""
    store = open_store(dataclasses.replace(location, url=url))
    for name, data in source.channel_files.items():
        store.put(name, [data])
    for rank in range(1, source.world_size):
        marker = f"close{rank_suffix(rank)}.json"
        if not source.is_foreign:
            store.put(marker, [_text(source.json(marker))])
    store.put(RUN_FILE, [_text(document)])
    store.close()


def _text(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()
