"""tlcore captures the tensors that flow through a PyTorch model, to interchangeable backends."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .adapters.vllm import install_import_hook

if TYPE_CHECKING:
    from .analysis import compare, stats
    from .analysis.replay import replay
    from .engine.capture import capture
    from .engine.hooks.tap_point import tap
    from .errors import BackendError, CaptureError, ConfigError, ReadError, TlcoreError, VerifyError
    from .protocols import Backend, Sink, Source, Store
    from .reader import open_run
    from .record import Record, RunInfo, StepSummary
    from .registry import register_backend, register_sink, register_store
    from .statistics.channels import ChannelStatistics, merge_channels
    from .storage import Location

# Loaded on first use, so that `tlcore --help` and the vLLM plugin's entry do not import torch.
_LAZY = {
    "BackendError": "errors",
    "CaptureError": "errors",
    "ConfigError": "errors",
    "ReadError": "errors",
    "TlcoreError": "errors",
    "VerifyError": "errors",
    "Backend": "protocols",
    "Location": "storage",
    "Sink": "protocols",
    "Source": "protocols",
    "Store": "protocols",
    "open_run": "reader",
    "ChannelStatistics": "statistics.channels",
    "merge_channels": "statistics.channels",
    "Record": "record",
    "RunInfo": "record",
    "StepSummary": "record",
    "register_backend": "registry",
    "register_sink": "registry",
    "register_store": "registry",
    "capture": "engine.capture",
    "compare": "analysis",
    "replay": "analysis.replay",
    "stats": "analysis",
    "tap": "engine.hooks.tap_point",
}

__all__ = [
    "Backend",
    "BackendError",
    "CaptureError",
    "ChannelStatistics",
    "ConfigError",
    "Location",
    "ReadError",
    "Record",
    "RunInfo",
    "Sink",
    "Source",
    "StepSummary",
    "Store",
    "TlcoreError",
    "VerifyError",
    "__version__",
    "capture",
    "compare",
    "merge_channels",
    "open_run",
    "register_backend",
    "register_sink",
    "register_store",
    "replay",
    "stats",
    "tap",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'tlcore' has no attribute {name!r}")
    found = getattr(import_module(f".{module}", __name__), name)
    # A model's code may ask for it a thousand times a step.
    if name == "tap":
        globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


# So that a script which imports tlcore before vLLM has the flag even where vLLM skips its plugins.
install_import_hook()
