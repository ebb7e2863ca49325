"""The README's configuration table, made from the JSON Schema: ``python -m tlcore.config.table``."""

from __future__ import annotations

import json
from typing import Any

import tlcore_schemas

from .validation import allowed


def table() -> str:
    """A Markdown table with a row for each key: what it allows, its default, what it means."""
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    rows += [_row(key, entry) for key, entry in tlcore_schemas.load("config.v1")["properties"].items()]
    return "\n".join(rows)


def _row(key: str, entry: dict[str, Any]) -> str:
    cells = (f"`{key}`", allowed(entry), f"`{json.dumps(entry['default'])}`", entry["description"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(table())
