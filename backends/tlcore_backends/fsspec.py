"""The ``fsspec`` backend: a spelling that says in one object where runs go and in which format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tlcore.protocols import Sink
from tlcore.storage import Location, RetryPolicy

from .pt.sink import PtSink
from .safetensors import versions

_REACHING = ("url", "storage_options", "deadline_s", "attempts")


def make_sink(format: Literal["pt", "safetensors"] = "pt", **options: Any) -> Sink:
    """The sink of a format; the other options say how its place is reached (`location`)."""
    if format == "pt":
        return PtSink()
    return versions.make_sink(**{key: value for key, value in options.items() if key not in _REACHING})


def location(options: Mapping[str, Any], output_dir: str) -> Location:
    """The URL in ``output_dir``, with the options that say how it is reached."""
    retries = {key: options[key] for key in ("deadline_s", "attempts") if key in options}
    return Location(output_dir, options.get("storage_options"), RetryPolicy(**retries))
