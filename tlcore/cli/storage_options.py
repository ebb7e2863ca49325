"""The option that commands taking a URL share."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..layout.jsontext import parse_json
from ..record import Json


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--storage-options``."""
    parser.add_argument(
        "--storage-options", metavar="JSON", help="options of the URL's fsspec filesystem, as a JSON object"
    )


def storage_options(
    args: argparse.Namespace, flag: str = "--storage-options", text: str | None = None
) -> Json | None:
    """The parsed ``--storage-options``, or ``text`` of another flag. Raises ConfigError, never quoting it."""
    given = args.storage_options if flag == "--storage-options" else text
    if given is None:
        return None
    try:
        options = parse_json(given)
    except ConfigError as error:
        raise ConfigError(flag, error.problem) from None
    if not isinstance(options, dict):
        raise ConfigError(flag, "must be a JSON object.")
    return options
