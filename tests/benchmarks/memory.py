"""Peak memory of a process that captures, over the same process without capture."""

from __future__ import annotations

from .rows import Row, Scale, at_most
from .subprocesses import report

_ALLOWANCE = 64 << 20
# Small enough that the prefill does not fit, and a roomy one.
_QUEUES = (64 << 20, 256 << 20)


def table(scale: Scale) -> list[Row]:
    """Peak over baseline, as a part of ``queue_bytes`` and 64 MiB."""
    rows = []
    for backend in ("pt", "safetensors"):
        for queue in _QUEUES:
            measured = report("memory_process", scale.name, backend, str(queue))
            over = measured["captured"] - measured["plain"]
            rows.append(
                Row(
                    f"peak RSS over baseline / (queue_bytes + 64 MiB), {backend}, queue {queue >> 20} MiB",
                    over / (queue + _ALLOWANCE),
                    at_most(1.0),
                    "",
                    f"{over / (1 << 20):.0f} MiB over {measured['plain'] / (1 << 20):.0f} MiB,"
                    f" {measured['steps']} steps of {measured['bytes'] / (1 << 20):.0f} MiB",
                )
            )
    return rows
