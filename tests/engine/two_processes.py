"""Running a program as the two ranks of a gloo group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.servers import free_ports


def run_two(program: str, *arguments: str) -> list[dict[str, Any]]:
    """Run Python's ``program`` as rank 0 and rank 1; the JSON object that each prints last."""
    (port,) = free_ports(1)
    processes = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, err[-3000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
    return found
