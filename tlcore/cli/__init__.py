"""The sub-commands: a table of names, and a parser that loads only the one in use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .._version import __version__

# Each module has HELP, configure(parser) and run(args). The text here keeps `--help` from loading them.
COMMANDS = {
    "ls": ("ls", "list the runs in a directory, the steps of a run, or the tensors of a step"),
    "show": ("show", "show a captured tensor or structure"),
    "verify": ("verify", "check that everything a run stored is there, whole and unchanged"),
    "compare": ("compare", "compare two runs and find where they part"),
    "explain": ("explain", "name the operator in which two runs part, by capturing both again"),
    "baseline": ("baseline", "keep a run beside the code, and fail a change that parts from it"),
    "stats": ("stats", "statistics of every tensor, and where NaN and Inf are first seen"),
    "replay": ("replay", "call a module again with a captured call's inputs, and compare"),
    "selftest": ("selftest", "check a model's captured rows against transformers: whose, and of which layer"),
    "convert": ("convert", "write a run into another backend, losslessly"),
    "export": ("export", "write the rows of requests as training sets of other tools"),
    "push": ("push", "deliver what waits in a spill_dir"),
    "prune": ("prune", "remove old or crashed runs and unfinished uploads, after asking"),
    "check-config": ("check_config", "check a configuration and print its normal form"),
}


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; a parsed command has ``run`` set."""
    top = argparse.ArgumentParser(prog="tlcore", description="Look at captured tensors.")
    top.add_argument(
        "--version", action=_Version, help="show the version, and which half of the hot path runs"
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=_LazyParser)
    for name, (module, summary) in COMMANDS.items():
        commands.add_parser(name, module=module, help=summary)
    return top


class _Version(argparse.Action):
    """Prints the version; what is asked for it is loaded only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it and exit."""
        from ..hotpath.native import in_use

        sys.stdout.write(f"tlcore {__version__}\n{in_use()}\n")
        parser.exit()


class _LazyParser(argparse.ArgumentParser):
    """A sub-command's parser that loads the command only when it parses or prints help."""

    def __init__(self, module: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._module: str | None = module

    def parse_known_args(  # type: ignore[override]  # typeshed overloads what argparse calls plainly
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Load the command, then parse its arguments."""
        if self._module is not None:
            command = import_module(f".{self._module}", __name__)
            self._module = None
            self.description = command.HELP
            command.configure(self)
            self.set_defaults(run=command.run)
        return super().parse_known_args(args, namespace)
