"""The JSON Schemas (2020-12) of tlcore's configuration and of the files in a run."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


def load(name: str) -> dict[str, Any]:
    """The schema ``name``, such as ``config.v1`` or ``backend/pt.v1``; a fresh copy on each call.

    Raises FileNotFoundError when there is no such schema.
    """
    document: dict[str, Any] = json.loads(_text(name))
    return document


@cache
def _text(name: str) -> str:
    return resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
