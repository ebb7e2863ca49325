"""The JSON Schemas (2020-12) of tlcore's configuration and of the files in a run."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def load(name: str) -> dict[str, Any]:
    """The schema ``name``, such as ``config.v1`` or ``backend/pt.v1``; a fresh copy on each call.

    Raises FileNotFoundError when there is no such schema.
    """
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document
