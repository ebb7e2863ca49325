"""The option that commands taking a URL share."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..jsontext import parse_json
from ..record import Json


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--storage-options``."""
    parser.add_argument(
        "--storage-options", metavar="JSON", help="options of the URL's fsspec filesystem, as a JSON object"
    )


def storage_options(args: argparse.Namespace) -> Json | None:
    """The parsed ``--storage-options``. Raises ConfigError, which never quotes it."""
    if args.storage_options is None:
        return None
    try:
        options = parse_json(args.storage_options)
    except ConfigError as error:
        raise ConfigError("--storage-options", error.problem) from None
    if not isinstance(options, dict):
        raise ConfigError("--storage-options", "must be a JSON object.")
    return options
