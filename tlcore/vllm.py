"""Capture in a running vLLM engine: ``tlcore.vllm.attach(llm, config)``."""

from __future__ import annotations

from .adapters.vllm.frontend.attach import attach
from .adapters.vllm.status import Status

__all__ = ["Status", "attach"]
