"""The two layouts of the ``safetensors`` backend: segments of many steps (2), or shards of each step (1)."""

from __future__ import annotations

from typing import Literal

from tlcore.protocols import Sink, Source
from tlcore.record import Json
from tlcore.storage import Store

from .segment_sink import SEGMENT_BYTES, SegmentSink
from .segment_source import SegmentSource
from .sink import SHARD_BYTES, SafetensorsSink
from .source import SafetensorsSource

DEFAULT_LAYOUT: Literal[1, 2] = 1


def make_sink(
    segment_bytes: int = SEGMENT_BYTES,
    commit_s: float | None = None,
    shard_bytes: int | None = None,
    layout: Literal[1, 2] | None = None,
) -> Sink:
    """The sink of a layout: 2, or 1 where ``shard_bytes`` is given, which only that one has."""
    if layout is None:
        layout = DEFAULT_LAYOUT if shard_bytes is None else 1
    if layout == 1:
        return SafetensorsSink(shard_bytes or SHARD_BYTES)
    return SegmentSink(segment_bytes, commit_s)


def open_source(store: Store, run: Json) -> Source:
    """The source of the layout that a run says it has."""
    return SegmentSource(store, run) if run.get("layout") == 2 else SafetensorsSource(store, run)
