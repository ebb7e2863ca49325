"""`tlcore selftest`: whether every captured row of every layer is the right row of the right layer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import texts
from .engines import add_process_options, engine_arguments, process_directory
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
    add("--engine-args", metavar="JSON", default="{}", help="further arguments of vllm.LLM")
    add("--trust-remote-code", action="store_true", help="run the code that the checkpoint brings")
    add("--seed", type=int, default=0, help="other prompts (default: %(default)s)")
    add_process_options(parser)
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Test the checkpoint; returns the exit status. Raises TlcoreError where nothing can be tested."""
    settings = _settings(args)
    with process_directory(args.keep, "selftest") as directory:
        return _run(settings, directory, args.json)


def _settings(args: argparse.Namespace) -> Settings:
    from ..adapters.selftest import WAYS, Settings

    arguments = engine_arguments("--engine-args", args.engine_args)
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
