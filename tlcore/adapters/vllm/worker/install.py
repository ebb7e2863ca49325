"""The worker process: a session opens once the model is loaded, or whenever one is asked for later."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

from ....config.configuration import load_config
from ..carrier import carried, is_carrier
from .capture import MARK, add_methods, capture_of

log = logging.getLogger("vllm.tlcore")


def patch_workers(module: ModuleType) -> None:
    """Instrument each worker after its ``init_device``. Safe to repeat."""
    cls = getattr(module, "WorkerWrapperBase", None)
    original = getattr(cls, "init_device", None)
    if cls is None or original is None or not hasattr(module, "WorkerBase"):
        # Raised where capture is asked for, not here: without it vLLM must run undisturbed.
        log.debug("vLLM has no WorkerWrapperBase.init_device or no WorkerBase")
        return
    if hasattr(cls, MARK):
        return

    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        carrier = carried(getattr(self.vllm_config, "additional_config", None))
        if carrier is not None and not hasattr(self.worker, MARK):
            _instrument(self.worker, carrier)
        return result

    setattr(cls, MARK, True)
    cls.init_device = init_device
    add_methods(module)


def _instrument(worker: Any, carrier: Any) -> None:
    """Wrap the worker's ``load_model``: the session starts once there is a model."""
    config = load_config(carrier["config"] if is_carrier(carrier) else carrier)
    if not config.enabled:
        return
    capture = capture_of(worker)
    original = worker.load_model

    @functools.wraps(original)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        worker.load_model = original
        capture.start(carrier)
        return result

    worker.load_model = load_model
