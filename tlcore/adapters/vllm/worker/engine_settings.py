"""What of vLLM's configuration changes how the same model rounds, for a run's ``environment``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ....record import Json
from ..frontend.check import mode_name

log = logging.getLogger("vllm.tlcore")
# Which kernels compute: of a captured step, too, although it runs eagerly.
_READ: dict[str, Callable[[Any], Any]] = {
    "compilation": lambda config: mode_name(config.compilation_config.mode),
    "cudagraphs": lambda config: mode_name(config.compilation_config.cudagraph_mode),
    "custom_ops": lambda config: ",".join(sorted(config.compilation_config.custom_ops)),
    "attention": lambda config: mode_name(config.attention_config.backend),
    "kv_cache_dtype": lambda config: str(config.cache_config.cache_dtype),
    "quantization": lambda config: str(config.model_config.quantization),
}


def engine_settings(vllm_config: Any) -> dict[str, str]:
    """The settings by name, as text; those that this vLLM does not have are left out."""
    found: Json = {}
    for name, read in _READ.items():
        try:
            found[name] = str(read(vllm_config))
        except (AttributeError, TypeError):
            log.debug("vLLM does not tell its %s", name, exc_info=True)
    return found
