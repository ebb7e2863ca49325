"""`tlcore selftest`: whether every captured row of every layer is the right row of the right layer."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, TlcoreError
from ..layout.jsontext import parse_json
from .arguments import texts
from .tables import printable

if TYPE_CHECKING:
    from ..adapters.selftest import Settings
    from ..analysis.selftest.judge import Verdict

HELP = (
    "Capture the same prompts in vLLM in several ways (alone, batched, chunked prefill, prefix cache,"
    " preempted, compiled) and in transformers on the same weights, and hold every row of every layer against"
    " what transformers computes. Exits with 0 where all are right, 1 where a way is not, 2 where nothing can"
    " be tested."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint's directory, or its name for transformers and vLLM")
    add("--ways", type=texts, help="some of the ways, comma-separated (default: all)")
    add("--dtype", default="float32", help="in which dtype both run (default: %(default)s)")
    add("--timeout", type=float, default=900.0, help="seconds for each process (default: %(default)g)")
    add("--engine-args", metavar="JSON", default="{}", help="further arguments of vllm.LLM")
    add("--trust-remote-code", action="store_true", help="run the code that the checkpoint brings")
    add("--seed", type=int, default=0, help="other prompts (default: %(default)s)")
    add("--keep", metavar="DIR", help="a new directory, for the captured runs and each process's log")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Test the checkpoint; returns the exit status. Raises TlcoreError where nothing can be tested."""
    settings = _settings(args)
    if args.keep is None:
        with tempfile.TemporaryDirectory(prefix="tlcore-selftest-") as directory:
            return _run(settings, Path(directory), args.json)
    try:
        Path(args.keep).mkdir(parents=True)
    except OSError as error:
        raise TlcoreError(
            f"{args.keep}: cannot be made ({error.strerror}); --keep takes a new one"
        ) from error
    return _run(settings, Path(args.keep), args.json)


def _settings(args: argparse.Namespace) -> Settings:
    from ..adapters.selftest import WAYS, Settings

    try:
        arguments = parse_json(args.engine_args)
    except ValueError as error:
        raise ConfigError("--engine-args", f"{args.engine_args!r} is no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ConfigError("--engine-args", f"{args.engine_args!r} is no JSON object.")
    ways = args.ways or WAYS
    return Settings(args.model, args.dtype, ways, args.timeout, arguments, args.trust_remote_code, args.seed)


def _run(settings: Settings, directory: Path, as_json: bool) -> int:
    # Imported here, since torch comes with it: help answers at once.
    from ..adapters.selftest import selftest

    def say(verdict: Verdict) -> None:
        if not as_json:
            print(f"{verdict.way:<16} {printable(verdict.line())}", flush=True)

    verdicts = selftest(settings, directory, say, lambda text: _log(text))
    if as_json:
        print(json.dumps({"model": settings.model, "ways": [each.to_json() for each in verdicts]}, indent=1))
    return 0 if all(each.right for each in verdicts) else 1


def _log(text: str) -> None:
    sys.stderr.write("".join(f"{printable(line)}\n" for line in text.splitlines()))
