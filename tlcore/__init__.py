"""tlcore captures the tensors that flow through a PyTorch model, to interchangeable backends."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .adapters.vllm import install_import_hook

if TYPE_CHECKING:
    from .analysis import compare, stats
    from .engine.capture import capture
    from .errors import BackendError, CaptureError, ConfigError, ReadError, TlcoreError, VerifyError
    from .protocols import Sink, Store
    from .reader import open_run
    from .record import Record, RunInfo, StepSummary
    from .registry import register_sink

# Loaded on first use, so that `tlcore --help` and the vLLM plugin's entry do not import torch.
_LAZY = {
    "BackendError": "errors",
    "CaptureError": "errors",
    "ConfigError": "errors",
    "ReadError": "errors",
    "TlcoreError": "errors",
    "VerifyError": "errors",
    "Sink": "protocols",
    "Store": "protocols",
    "open_run": "reader",
    "Record": "record",
    "RunInfo": "record",
    "StepSummary": "record",
    "register_sink": "registry",
    "capture": "engine.capture",
    "compare": "analysis",
    "stats": "analysis",
}

__all__ = [
    "BackendError",
    "CaptureError",
    "ConfigError",
    "ReadError",
    "Record",
    "RunInfo",
    "Sink",
    "StepSummary",
    "Store",
    "TlcoreError",
    "VerifyError",
    "__version__",
    "capture",
    "compare",
    "open_run",
    "register_sink",
    "stats",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'tlcore' has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# So that a script which imports tlcore before vLLM has the flag even where vLLM skips its plugins.
install_import_hook()
