"""Capture in a running vLLM engine: ``tlcore.vllm.attach(llm, config)``."""

from __future__ import annotations

from .adapters.vllm.frontend.attach import Status, attach

__all__ = ["Status", "attach"]
