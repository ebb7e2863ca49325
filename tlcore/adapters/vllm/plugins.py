"""The names by which vLLM knows tlcore's plugins, as they stand in ``VLLM_PLUGINS``."""

PLUGIN = "tlcore"
ENDPOINT = "tlcore.endpoint"
