"""A new run: its id, where it will lie, and what its ``run.json`` says."""

from __future__ import annotations

import inspect
import logging
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .. import registry
from .._version import __version__
from ..config.configuration import Config
from ..errors import CaptureError, ConfigError
from ..layout.times import time_text
from ..ledger import Ledger
from ..locations import absolute_location, is_url
from ..protocols import Sink, SupportsLayouts
from ..record import LAYOUT_VERSION, Json, RunInfo, SpillLocation
from ..storage import Location
from .pipeline.cpus import unbound
from .run_documents import RunDocuments

log = logging.getLogger("tlcore")
# Spilling must begin before a step gives up waiting for the queue.
_LEAST_PATIENCE_S, _MOST_PATIENCE_S = 0.5, 5.0


def new_run_id() -> str:
    """A UUIDv7 (RFC 9562): its first 48 bits are milliseconds, so run directories sort by time."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def new_run(
    config: Config,
    rank: int = 0,
    world_size: int = 1,
    run_id: str | None = None,
    extra_versions: Mapping[str, str] | None = None,
    backend: str | None = None,
) -> RunInfo:
    """Describe a run: where it will lie, and the content of its ``run.json``."""
    run_id = run_id or new_run_id()
    versions = {
        "tlcore": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **(extra_versions or {}),
    }
    document: Json = {
        "layout": LAYOUT_VERSION,
        "run_id": run_id,
        "created": time_text(time.time_ns()),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": world_size,
        "config": config.to_json(redact=True),
        "backend": backend or registry.resolve(config.backend).written_as(config.backend_options),
        "versions": versions,
    }
    if backend is not None:
        document["config"]["backend"] = backend
    return RunInfo(
        run_id=run_id,
        url=f"{absolute_location(location_of(config).url)}/{run_id}",
        rank=rank,
        world_size=world_size,
        document=document,
        ledger=Ledger(),
        fsync=config.fsync,
        spill=_spill_place(config, run_id),
        queue_bytes=config.queue_bytes,
    )


def run_of_group(config: Config, group: Any, backend: str | None) -> RunInfo:
    """A run of this process, or one of all processes of a ``torch.distributed`` group, all of whom ask."""
    if group is None:
        return new_run(config, backend=backend)
    from torch import distributed

    size, rank = distributed.get_world_size(group), distributed.get_rank(group)
    if rank < 0:
        raise CaptureError("this process is not in the group whose processes write one run together")
    shared: list[str | None] = [new_run_id() if rank == 0 else None]
    distributed.broadcast_object_list(shared, distributed.get_global_rank(group, 0), group)
    return new_run(config, rank, size, shared[0], backend=backend)


def location_of(config: Config) -> Location:
    """Where the configured backend's runs lie, and how that is reached. Raises ConfigError."""
    return registry.resolve(config.backend).located(config.backend_options, config.output_dir)


def _spill_place(config: Config, run_id: str) -> SpillLocation | None:
    if config.spill_dir is None:
        return None
    patience_s = min(max(config.block_s / 2, _LEAST_PATIENCE_S), _MOST_PATIENCE_S)
    return SpillLocation(os.path.join(absolute_location(config.spill_dir), run_id), patience_s)


@unbound()
def open_run(config: Config, run: RunInfo, sink: Sink | None = None) -> tuple[RunDocuments, Sink]:
    """A new run's ``run.json`` written, and its sink (``sink``, or the configured backend's) opened.

    Raises BackendError when the place cannot be written, ConfigError for options that the sink does not take.
    """
    sink = sink if sink is not None else make_sink(config)
    run = replace(run, document={**run.document, "layout": layout_of(sink)})
    documents = RunDocuments(run, location_of(config))
    documents.open()
    if run.rank == 0 and is_url(run.url) and run.document.get("backend") == "pt" and not config.log_step_ids:
        log.warning(
            "%s gets one object for each tensor of each step; for many steps take the safetensors format"
            " with layout 2, which puts many steps into one",
            run.shown_url,
        )
    try:
        sink.open(documents.run)
    except BaseException:
        documents.abandon()
        raise
    return documents, sink


def layout_of(sink: Sink) -> int:
    """The layout version of the runs that a sink writes; a format that has several says which it is."""
    return sink.layout if isinstance(sink, SupportsLayouts) else LAYOUT_VERSION


def make_sink(config: Config) -> Sink:
    """The configured backend's sink, not yet opened. Raises ConfigError for options that it does not take."""
    factory = registry.resolve(config.backend).factory
    try:
        inspect.signature(factory).bind(**config.backend_options)
    except TypeError as error:
        raise ConfigError("$.backend", f"{config.backend!r} does not take these options: {error}.") from None
    except ValueError:
        # Some callables, written in C, do not tell their signature.
        pass
    return factory(**config.backend_options)
