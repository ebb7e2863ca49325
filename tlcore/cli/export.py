"""`tlcore export`: a run's rows as training sets of other tools."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..errors import ConfigError
from ..locations import is_url, redact_url
from ..reader import open_run
from .dask import client_of
from .output import progress
from .storage_options import add_storage_options, storage_options
from .tables import printable

HELP = (
    "Write the rows of requests into a new directory or URL. requests: one safetensors file a request"
    " (hidden_states [tokens, layers, size], token_ids), as vLLM's extraction and speculators have them; hf:"
    " a Hugging Face data set (Parquet, a row a request); arrow: one for load_from_disk (with --context as"
    " SAELens caches activations); parquet, npy: a row a token. In all but requests bfloat16 becomes float32,"
    " which loses nothing. Requests with gaps are left out of the first three, and counted."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="RUN", help="the run's directory; a path or URL")
    parser.add_argument("target", metavar="TARGET", help="the directory to make; a path or URL")
    parser.add_argument(
        "--format", required=True, choices=["requests", "hf", "arrow", "parquet", "npy"], help="what to write"
    )
    parser.add_argument(
        "--tensor",
        action="append",
        required=True,
        metavar="NAME",
        help="a tensor without its step, with or without the device (model.layers.5/outputs), or a sum"
        ", 'A + B' (vLLM's layers: 'model.layers.5/outputs_0 + model.layers.5/outputs_1'); several in order",
    )
    parser.add_argument(
        "--rows",
        default="all",
        metavar="WINDOW",
        help='all (default), prompt, response, {"from": a, "to": b}',
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="hf, arrow: pieces of N positions, not requests"
    )
    parser.add_argument(
        "--loss",
        choices=["response", "all"],
        default="response",
        help="requests: which positions loss_mask has",
    )
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="let a Dask cluster do the work; it must see the run and TARGET"
    )
    add_storage_options(parser)
    parser.add_argument(
        "--target-storage-options", metavar="JSON", help="those of TARGET, where they are not those of RUN"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and say what was written and left out. Raises TlcoreError as `export` does."""
    # Imported here, since torch comes with it: help answers at once.
    from ..runs.export.export import export

    source = open_run(args.path, storage_options(args))
    given = "--target-storage-options", args.target_storage_options
    options = storage_options(args, *given) if args.target_storage_options else storage_options(args)
    with client_of(args.dask) as client, progress("export", "items") as bar:
        done = export(
            source,
            args.target,
            args.format,
            args.tensor,
            _window(args.rows),
            args.context,
            args.loss,
            bar or (lambda done, total: None),
            options if is_url(args.target) else None,
            client,
        )
    print(printable(f"{redact_url(args.target)}: {done.items} items"))
    if source.injection is not None:
        print(printable(f"note: the run was {source.injection}"), file=sys.stderr)
    if done.left_out:
        request, reason = next(iter(done.left_out.items()))
        count = f"{len(done.left_out)} requests" if len(done.left_out) > 1 else "1 request"
        # Not with the result, which scripts read.
        print(printable(f"note: {count} left out, the first is {request}: {reason}"), file=sys.stderr)
    return 0


def _window(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("--rows", f"is no JSON object ({error}).") from None
