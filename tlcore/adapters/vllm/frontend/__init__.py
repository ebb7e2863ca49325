"""vLLM's front-end process. Private."""
