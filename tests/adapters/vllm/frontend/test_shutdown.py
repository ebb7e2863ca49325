"""Time for workers and engines to end by themselves, in vLLM's own functions."""

from __future__ import annotations

import os

import pytest

from tlcore.adapters.vllm.frontend.shutdown import give_workers_time

WORKERS = "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"
# What the executor waits after the signal that it sends to workers which have not heard of the end.
AFTER_SIGNAL_S = 4


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [None, "7"])
def test_an_engine_is_waited_for_until_its_workers_have_been_signalled(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.setenv(WORKERS, chosen or "")
    if chosen is None:
        monkeypatch.delenv(WORKERS)
    give_workers_time()
    from vllm.v1.engine.utils import get_engine_process_shutdown_timeout

    workers = float(os.environ[WORKERS])
    assert workers == float(chosen or 60)
    assert (get_engine_process_shutdown_timeout(0, 0) or 0) > workers + AFTER_SIGNAL_S
    # A deadline that the user set for requests is the user's.
    assert get_engine_process_shutdown_timeout(30, 0) == 0
