"""vLLM's CPU platform, but one that Ray may place workers on: stock vLLM declares Ray for accelerators only.

A logical Ray device stands for a worker's place; the workers run on the CPU as ever.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """The CPU, with logical GPUs as what Ray counts."""

    ray_device_key = "GPU"


def platform() -> str:
    """What vLLM's entry-point group ``vllm.platform_plugins`` asks for."""
    return f"{__name__}.RayCpuPlatform"
