"""Opens a run at its place, so that vLLM's front end learns before a model loads whether it can be written.

Run as a program (``python -m tlcore.adapters.vllm.frontend.probe``) with the carrier as JSON on standard
input: vLLM forks its workers, and no connection, loop or thread of a storage client may cross a fork.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ....errors import BackendError, TlcoreError

# Longer than a backend's own deadline and retries for one small blob.
_DEADLINE_S = 300
_REFUSED = 3


def probe(carrier: Mapping[str, Any]) -> None:
    """Write the ``run.json`` of a carrier's run, in another process.

    Raises BackendError with the backend's own words when the place cannot be written.
    """
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(carrier),
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BackendError(f"the backend did not answer within {_DEADLINE_S} s") from None
    if done.returncode == _REFUSED:
        raise BackendError(done.stdout.strip())
    if done.returncode != 0:
        # The last line of a traceback may quote a secret; the exit status does not.
        raise BackendError(f"the backend could not be tried out (exit status {done.returncode})")


def main() -> int:
    """Open the run described on standard input; the refusal, if any, goes to standard output."""
    from ....config.configuration import load_config
    from ....engine.new_run import new_run, open_run

    carrier = json.load(sys.stdin)
    try:
        config = load_config(carrier["config"])
        open_run(config, new_run(config, run_id=carrier["run_id"]))
    except TlcoreError as error:
        sys.stdout.write(f"{error}\n")
        return _REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
