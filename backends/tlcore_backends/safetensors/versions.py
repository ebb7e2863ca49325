"""The two layouts of the ``safetensors`` backend: segments of many steps (2), or shards of each step (1).

Of their sinks and sources only the one that is needed is loaded.
"""

from __future__ import annotations

from typing import Literal

from tlcore.errors import ConfigError
from tlcore.protocols import Sink, Source
from tlcore.record import Json
from tlcore.storage import Store

DEFAULT_LAYOUT: Literal[1, 2] = 2


def make_sink(
    segment_bytes: int | None = None,
    commit_s: float | None = None,
    shard_bytes: int | None = None,
    layout: Literal[1, 2] | None = None,
) -> Sink:
    """The sink of a layout; an option that only one of them has selects it.

    Raises ConfigError for options of both, or of the other one than ``layout``.
    """
    segments = [
        name
        for name, value in (("segment_bytes", segment_bytes), ("commit_s", commit_s))
        if value is not None
    ]
    shards = ["shard_bytes"] if shard_bytes is not None else []
    if layout is None:
        layout = 1 if shards else 2 if segments else DEFAULT_LAYOUT
    if wrong := segments if layout == 1 else shards:
        hint = f"Leave it out, or say layout {3 - layout}."
        raise ConfigError(f"$.backend.{wrong[0]}", f"layout {layout} has no such option.", hint)
    if layout == 1:
        from .sink import SHARD_BYTES, SafetensorsSink

        return SafetensorsSink(shard_bytes or SHARD_BYTES)
    from .segment_sink import SEGMENT_BYTES, SegmentSink

    return SegmentSink(segment_bytes or SEGMENT_BYTES, commit_s)


def open_source(store: Store, run: Json) -> Source:
    """The source of the layout that a run says it has."""
    if run.get("layout") == 2:
        from .segment_source import SegmentSource

        return SegmentSource(store, run)
    from .source import SafetensorsSource

    return SafetensorsSource(store, run)
