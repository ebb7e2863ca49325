"""`tlcore replay`: one captured call again, with a module that is made for it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .arguments import local_path
from .output import write_text
from .storage_options import add_storage_options, storage_options
from .tables import printable

if TYPE_CHECKING:
    from ..analysis.replay import Replayed
    from ..analysis.replay.modules import Recipe
    from ..reader import Run

HELP = (
    "Call a module again with the stored inputs of one captured call, and compare the result with what was"
    " stored. Exits with 0 where they agree, or with 1."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("run_path", metavar="RUN", help="a run's directory; a path or URL")
    add("call", metavar="CALL", help="a call's directory in a step, such as step_0/model.layers.5")
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--module", metavar="PKG.MOD:CLASS", help="its class, or a function that makes it")
    made.add_argument("--model", metavar="DIR", help="a checkpoint for transformers, which has the module")
    add("--init", metavar="JSON", default="{}", help="keyword arguments for --module")
    add("--weights", metavar="FILE", help="its state dict: .safetensors, .pt, or a checkpoint's directory")
    add(
        "--prefix",
        metavar="NAME",
        help="what the weights' names begin with (default: the module's)",
    )
    add("--set", dest="replaced", metavar="ARG=JSON", action="append", default=[],
        help="an argument, by position or name, in the place of the stored one")  # fmt: skip
    add("--device", help="where a copy of the module runs, such as cuda:0")
    add("--dtype", help="in which dtype a copy of the module runs, such as float32")
    add("--rtol", type=float, help="as of compare")
    add("--atol", type=float, help="as of compare")
    add("--rank", type=int, default=0, help="whose call (default: %(default)s)")
    add("--minimise", metavar="SCRIPT.py", type=local_path,
        help="write a script that shows the difference by itself, with as few rows as do")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Replay the call; returns the exit status. Raises TlcoreError when that is not possible."""
    from ..analysis.replay import replay
    from ..layout.dtypes import torch_dtype
    from ..reader import open_run

    dtype = None if args.dtype is None else torch_dtype(args.dtype)
    if args.dtype is not None and dtype is None:
        raise ConfigError("--dtype", f"{args.dtype!r} is no dtype", "Such as float32.")
    opened = open_run(args.run_path, storage_options(args))
    # As with `python -m`, a module that lies here is found.
    sys.path.insert(0, os.getcwd())
    recipe = _recipe(args, opened)
    recipe.device, recipe.dtype = args.device, dtype
    module = recipe.make()
    found = replay(
        opened, args.call, module, replace=_replaced(args.replaced), device=args.device, dtype=dtype,
        rtol=args.rtol, atol=args.atol, rank=args.rank,
    )  # fmt: skip
    _print(found, args.json)
    if args.minimise is not None:
        _minimise(args, opened, recipe, found)
    return 0 if found.equal else 1


def _recipe(args: argparse.Namespace, opened: Run) -> Recipe:
    from ..analysis.replay.again import call_in
    from ..analysis.replay.modules import Recipe, init_of

    name = call_in(opened, args.call, args.rank).module
    environment = opened.document.get("environment")
    of = environment.get("model") if isinstance(environment, dict) else None
    return Recipe(name, args.module, init_of(args.init), args.weights, args.prefix, args.model, of=of)


def _replaced(texts: list[str]) -> dict[int | str, Any]:
    found: dict[int | str, Any] = {}
    hint = "Such as past_key_values=null, or dtype=torch.bfloat16."
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            found[int(key) if key.isdigit() else key] = _dtype_of(value) or json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError("--set", f"{text[:200]!r} is not ARG=JSON", hint) from error
        if not equals or not key:
            raise ConfigError("--set", f"{text!r} is not ARG=JSON", hint)
    return found


def _dtype_of(text: str) -> Any:
    """The dtype that a text such as ``torch.bfloat16`` names; None for any other text."""
    from ..layout.dtypes import torch_dtype

    module, dot, name = text.partition(".")
    return torch_dtype(name) if module == "torch" and dot else None


def _print(found: Replayed, as_json: bool) -> None:
    if as_json:
        results = [each.to_json() for each in found.results]
        document = {"run": found.run, "call": found.call, "equal": found.equal, "results": results}
        write_text(json.dumps(document, indent=1) + "\n", None)
    else:
        print(printable(str(found)))


def _minimise(args: argparse.Namespace, opened: Run, recipe: Recipe, found: Replayed) -> None:
    from ..analysis.replay.again import call_in
    from ..analysis.replay.minimise import minimised
    from ..analysis.replay.script import write_script

    module = recipe.made
    assert module is not None
    stored = call_in(opened, args.call, args.rank).outputs
    smallest = minimised(found, stored, module, found.tolerance)
    script, data = write_script(args.minimise, smallest, recipe, str(found), found.tolerance)
    rows = ", ".join(f"{first} to {end - 1} of dimension {at}" for at, (first, end) in smallest.rows.items())
    sys.stderr.write(f"{script} and {data} show it{f' with rows {rows}' if rows else ''}\n")
