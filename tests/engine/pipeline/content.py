"""What a run holds, for tests that hold two runs of the same calls against each other."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tlcore

# Where a record lies in its file.
PLACES = ("file", "key", "offset")


def content(run: tlcore.Run, left_out: Collection[str] = ()) -> dict[str, Any]:
    """All that a reader sees but for times, and what is ``left_out`` of each record."""
    found: dict[str, Any] = {}
    for number in run.steps:
        step = run.step(number)
        for record in step.records:
            said = {key: value for key, value in record.items() if key not in left_out}
            found[record["name"]] = said, step.tensor(record["name"]).tolist()
        document = step.documents[0]
        found[str(number)] = step.structures(0), document["ledger"], document["calls"]
    return found
