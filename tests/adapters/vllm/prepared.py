"""A process that has imported vLLM once, and runs each script in a fork of itself.

Importing vLLM takes eight seconds of processor time, three times what an engine of a tiny model takes to
start. No engine has run in it and it has no threads of Python's, so a fork does what a new process would;
only what libraries read of the environment while they are imported is as it was at the first script.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

# What an engine in one process imports.
OF_ENGINES = (
    "vllm.entrypoints.llm",
    "vllm.sampling_params",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
)
# What starts processes in vLLM, and what is set in a script's environment to have them forked.
OF_PROCESSES = (
    "vllm.v1.engine.utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
)
FORKS = "TESTS_FORK_ENGINES"


class Prepared:
    """The process of one run of the tests, started when it is first asked; it ends with the one that asks."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], modules: Sequence[str] = OF_ENGINES
    ) -> None:
        self._directory, self._environment, self._modules = directory, dict(environment), modules
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a script as `subprocess.run` does; raises TimeoutExpired where it has not ended by then."""
        with tempfile.TemporaryDirectory() as place:
            paths = Path(place, "stdout"), Path(place, "stderr")
            asked = {"arguments": arguments, "environment": dict(environment), "output": [*map(str, paths)]}
            status: bytes | None = None
            try:
                requests, answers = self._pipes()
                requests.write(json.dumps(asked).encode() + b"\n")
                if select.select([answers], [], [], timeout)[0]:
                    status = answers.readline()
            finally:
                if not status:
                    self._end()
            if status is None:
                raise subprocess.TimeoutExpired(list(arguments), timeout)
            said = [path.read_text(errors="replace") if path.exists() else "" for path in paths]
            return subprocess.CompletedProcess(list(arguments), int(status or -1), *said)

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.adapters.vllm.prepared", *self._modules],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _end(self) -> None:
        """End it, with the script that it is running and all of that one's processes."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate(timeout=60)
            self._process = None


def _fork_engines() -> None:
    """Let processes of vLLM be forks of the script, too, which need not import anything."""
    context = multiprocessing.get_context("fork")
    for name in OF_PROCESSES:
        importlib.import_module(name).__dict__["get_mp_context"] = lambda: context


def _become(arguments: list[str], environment: dict[str, str], output: list[str]) -> str:
    """Make this process one that was started with these; returns the script."""
    os.environ.clear()
    os.environ.update(environment)
    added = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each not in sys.path]
    sys.path[:1] = [str(Path(arguments[0]).parent), *added]
    sys.argv = arguments
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if FORKS in environment:
        _fork_engines()
    for number, path in enumerate([os.devnull, *output]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    return arguments[0]


def _next_script(answers: IO[bytes]) -> str | None:
    """Fork for every script that is asked for: returns in the fork, and None when no more will come."""
    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            answers.close()
            return _become(**json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(f"{status}\n".encode())
        answers.flush()
    return None


if __name__ == "__main__":
    # Libraries and scripts may print.
    _answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for _module in sys.argv[1:]:
        importlib.import_module(_module)
    _script = _next_script(_answers)
    if _script is not None:
        runpy.run_path(_script, run_name="__main__")
