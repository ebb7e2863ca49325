"""An engine that waits for requests hears the signal that asks it to end, whenever that comes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tlcore.adapters.vllm

# The thread that gets the signal is not the one that waits: as where it comes just before the wait begins,
# the handler is due and the wait is not interrupted.
WAITS = """
import os, queue, signal, threading
from types import ModuleType

from tlcore.adapters.vllm.frontend.signals import patch_core


class EngineCoreProc:
    def __init__(self):
        self.input_queue = queue.Queue()

    def run_busy_loop(self):
        while True:
            print(self.input_queue.get(block=True), flush=True)


def ask():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    engine.input_queue.put("a request")
    while engine.input_queue.qsize() or not engine.input_queue.not_empty._waiters:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def end(*_):
    raise SystemExit(7)


module = ModuleType("core")
module.EngineCoreProc = EngineCoreProc
patch_core(module)
patch_core(module)
signal.signal(signal.SIGTERM, end)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
engine = EngineCoreProc()
threading.Thread(target=ask, daemon=True).start()
engine.run_busy_loop()
"""


def test_a_signal_from_before_the_wait_is_heard(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "a request\n"), done.stderr


@pytest.mark.slow
def test_engines_of_vllm_wait_so() -> None:
    tlcore.adapters.vllm.register()
    from vllm.v1.engine import core

    assert "input_queue" in inspect.unwrap(core.EngineCoreProc.__init__).__code__.co_names
    for engine in (core.EngineCoreProc, core.DPEngineCoreProc):
        assert engine.run_busy_loop.__code__.co_filename.endswith("signals.py")
