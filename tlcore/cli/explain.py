"""`tlcore explain`: the operator and line in which two runs part, by capturing both once more."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from . import compare as compare_command
from .engines import add_process_options, engine_arguments, process_directory
from .output import write_text
from .tables import printable

if TYPE_CHECKING:
    from ..adapters.explain import Explanation, Maker
    from ..analysis import Comparison

HELP = (
    "Compare two runs, then let transformers or vLLM compute the text in which they part once more, with the"
    " operators of the module in which they do, and compare these. Exits with 0 where A and B agree, with 1"
    " where they do not, with 2 where they cannot be compared or made again."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("a", metavar="A", help="a run's directory; a path or URL")
    add("b", metavar="B", help="the directory of the run to compare it with")
    add(
        "--model",
        required=True,
        metavar="MODEL",
        help="A's checkpoint: a directory, or its name for an engine",
    )
    add("--model-b", metavar="MODEL", help="B's, where it is not A's")
    add("--engine", metavar="ENGINE", help="transformers or vllm, for A (default: what it was captured in)")
    add("--engine-b", metavar="ENGINE", help="likewise for B")
    add("--dtype", help="for A (default: what most of its tensors have)")
    add("--dtype-b", help="likewise for B")
    add(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="further arguments of A's vllm.LLM or from_pretrained",
    )
    add("--engine-args-b", metavar="JSON", help="B's (default: A's, where the engine is the same)")
    add_process_options(parser)
    compare_command.options(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, explain and report; returns the exit status. Raises TlcoreError when it cannot."""
    makers = _makers(args)
    first = compare_command.compared(args, args.a, args.b)
    with process_directory(args.keep, "explain") as directory:
        return _run(first, makers, directory, args)


def _makers(args: argparse.Namespace) -> tuple[Maker, Maker]:
    # Imported here, as below, since torch comes with it: help answers at once.
    from ..adapters.explain import Maker

    given = engine_arguments("--engine-args", args.engine_args)
    given_b = None if args.engine_args_b is None else engine_arguments("--engine-args-b", args.engine_args_b)
    return (
        Maker(args.model, args.engine, args.dtype, given),
        Maker(args.model_b or args.model, args.engine_b, args.dtype_b, given_b),
    )


def _run(first: Comparison, makers: tuple[Maker, Maker], directory: Path, args: argparse.Namespace) -> int:
    from ..adapters.explain import explain

    # The runs made again have other steps and requests, lie here, and have no further runs like them.
    again: dict[str, object] = {
        "steps": None,
        "modules": [],
        "request": [],
        "noise": [],
        "storage_options": None,
    }
    narrowed = argparse.Namespace(**{**vars(args), **again, "storage_options_b": None})

    def compare_again(a: str, b: str) -> Comparison:
        return compare_command.compared(narrowed, a, b)

    found = explain(first, makers, directory, compare_again, args.timeout)
    _report(found, args)
    return 0 if first.equal else 1


def _report(found: Explanation, args: argparse.Namespace) -> None:
    if args.format == "json":
        write_text(json.dumps(found.to_json(), indent=1) + "\n", args.output)
        return
    if args.format == "html":
        compare_command.report(found.again[-1] if found.again else found.first, args)
        return
    lines = [f"as captured: {found.first.first_divergence or 'no value differs'}", f"explained: {found}"]
    if args.output is None:
        print("\n".join(map(printable, lines)))
    else:
        write_text("\n".join(lines) + "\n", args.output)
