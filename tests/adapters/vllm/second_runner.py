"""vLLM's second model runner, the default on GPUs, on a CPU: the real classes, with interpreted kernels.

vLLM runs it on a CPU where Triton has a backend for CPUs. Triton's own interpreter needs none, but vLLM asks
for one by name before it looks at what Triton can do.
"""

from __future__ import annotations

import os
from types import SimpleNamespace


def use_second_runner() -> None:
    """Let every engine of this process use it. To be called before vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
