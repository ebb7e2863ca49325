"""Rewriting a stored run into another backend, without loss: there and back gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from ..config.configuration import Config
from ..engine.new_run import layout_of, make_sink
from ..engine.run_documents import RunDocuments
from ..errors import ConfigError, ReadError, VerifyError
from ..layout.checksums import with_checksum
from ..layout.names import rank_suffix
from ..layout.run_files import RUN_FILE
from ..ledger import Ledger
from ..locations import absolute_location, is_url, redact_url
from ..reader import MissingError, Run, is_run
from ..reader.documents import FOREIGN
from ..reader.lasting import lasting_objects
from ..reader.verify import verify_documents
from ..record import Json, RunInfo
from ..registry import open_store, resolve
from ..storage import Location, SupportsCachedWrites
from .conversion import convert_rank
from .whole_files import take_rank, would_take


def convert(source: Run, config: Config, on_tensors: Callable[[int], None] = lambda _: None) -> str:
    """Write ``source`` into ``config.output_dir`` with ``config.backend``; returns the new run's URL.

    The run keeps its id. ``on_tensors`` is told how many more are there, whose hashes were checked.
    What fails half-way reads as an incomplete run. Raises ReadError for a run that is not complete, and
    for a place that already holds it or is a run itself, VerifyError for damage, ConfigError for a backend
    without a reader, BackendError when the place cannot be written.
    """
    if source.state != "complete":
        raise ReadError(f"{source.url}: the run is not complete, so it cannot be converted")
    _check_documents(source)
    backend = resolve(config.backend)
    if backend.written_as(config.backend_options) == backend.name and backend.source is None:
        problem = f"{backend.name!r} has no reader, so what convert wrote could not be read."
        raise ConfigError("$.backend", problem, "Register it with a source.")
    location = backend.located(config.backend_options, config.output_dir)
    parent = absolute_location(location.url).rstrip("/")
    if _is_taken(parent, location.storage_options):
        raise ReadError(
            f"{redact_url(parent)}: is a run itself; give the directory that the new one goes into"
        )
    url = f"{parent}/{source.id}"
    if _is_taken(url, location.storage_options):
        raise ReadError(f"{redact_url(url)}: already holds a run; convert into another directory")
    document = {**source.document, "backend": backend.written_as(config.backend_options)}
    if document.pop(FOREIGN, None):
        document |= {"converted_from": source.document["backend"], "ledger": source.ledger_of(0).to_json()}
    takes_files = not is_url(url) and would_take(source, make_sink(config))
    for rank in reversed(range(source.world_size)):
        sink = make_sink(config)
        document["layout"] = layout_of(sink)
        run = RunInfo(source.id, url, rank, source.world_size, document, Ledger(), config.fsync)
        documents = RunDocuments(run, location)
        if isinstance(documents.run.store, SupportsCachedWrites):
            documents.run.store.write_cached()
        with lasting_objects():
            if takes_files:
                take_rank(source, documents, on_tensors)
            else:
                convert_rank(source, sink, documents, on_tensors)
    _restore_documents(source, dataclasses.replace(location, url=url, fsync=config.fsync), document)
    return url


def _check_documents(source: Run) -> None:
    """Raise VerifyError for a damaged document of the run: rewritten, it would get a checksum that fits."""
    if source.is_foreign:
        return
    markers = [_marker(rank) for rank in range(1, source.world_size)]
    bad, _ = verify_documents(source.stored.files, [RUN_FILE, *markers])
    if bad:
        raise VerifyError(bad)


def _is_taken(url: str, storage_options: Mapping[str, Any] | None) -> bool:
    try:
        return is_run(url, storage_options)
    except MissingError:
        return False


def _restore_documents(source: Run, location: Location, document: Json) -> None:
    """Put back what a new run cannot know: when the source was closed, and with which ledger."""
    store = open_store(location)
    for name, data in source.channel_files.items():
        store.put(name, [data])
    for rank in range(1, source.world_size):
        if not source.is_foreign:
            store.put(_marker(rank), [_text(source.json(_marker(rank)))])
    store.put(RUN_FILE, [_text(document)])
    store.close()


def _marker(rank: int) -> str:
    return f"close{rank_suffix(rank)}.json"


def _text(document: Any) -> bytes:
    return with_checksum(json.dumps(document, indent=1) + "\n")
