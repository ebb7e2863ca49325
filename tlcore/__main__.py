"""The `tlcore` command: finds the sub-command, runs it, and prints errors on one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from . import cli
from .errors import TlcoreError
from .layout.names import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 well, 2 for bad input, else the command's own."""
    args = cli.parser().parse_args(argv)
    return guarded(lambda: args.run(args))


def guarded(run: Callable[[], int]) -> int:
    """A command's status; its errors are printed on one line, and give 2."""
    try:
        status = run()
        sys.stdout.flush()
    except TlcoreError as error:
        sys.stderr.write(f"error: {printable(' '.join(str(error).split()))}\n")
        return 2
    except BrokenPipeError:
        # The reader, such as head, has gone; keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
