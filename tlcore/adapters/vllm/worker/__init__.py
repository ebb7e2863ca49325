"""vLLM's worker processes. Private."""
