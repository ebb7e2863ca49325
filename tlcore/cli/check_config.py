"""`tlcore check-config`: the normal form of a configuration, or everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..config.configuration import check_config, read_config_file
from ..errors import ConfigError

HELP = "Check a configuration and print it with every key filled in and secrets redacted."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a file, - for standard input, or JSON such as '{}'")
    parser.add_argument("--json", action="store_true", help="print one JSON object with config and errors")


def run(args: argparse.Namespace) -> int:
    """Print the configuration and return 0, or its problems and return 2."""
    try:
        config, found = check_config(_text(args.config))
    except ConfigError as error:
        config, found = None, [error]
    document = None if config is None else config.to_json(redact=True)
    if args.json:
        print(json.dumps({"config": document, "errors": _described(found)}, indent=2))
    elif document is not None:
        print(json.dumps(document, indent=2))
    else:
        for problem in found:
            print(f"error: {problem}", file=sys.stderr)
    return 2 if found else 0


def _text(source: str) -> str:
    if source == "-":
        return sys.stdin.read()
    return source if source.lstrip().startswith("{") else read_config_file(source)


def _described(found: Sequence[ConfigError]) -> list[dict[str, str | None]]:
    return [{"path": error.path, "problem": error.problem, "hint": error.hint} for error in found]
