"""Capture in a running vLLM engine: ``tlcore.vllm.attach(llm, config)``."""

from __future__ import annotations

from .adapters.vllm.frontend.attach import attach
from .adapters.vllm.frontend.status import Status

__all__ = ["Status", "attach"]
