"""``python -m tlcore.compare_il --dir1 A --dir2 B``: the documented spelling of `tlcore compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .__main__ import guarded
from .cli import compare


def main(argv: Sequence[str] | None = None) -> int:
    """Compare ``--dir1`` with ``--dir2``; the exit status is that of `tlcore compare`."""
    parser = argparse.ArgumentParser(prog="python -m tlcore.compare_il", description=compare.HELP)
    parser.add_argument("--dir1", dest="a", required=True, metavar="A", help="a run's directory")
    parser.add_argument("--dir2", dest="b", required=True, metavar="B", help="the other run's directory")
    compare.options(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: compare.run(args))


if __name__ == "__main__":
    sys.exit(main())
