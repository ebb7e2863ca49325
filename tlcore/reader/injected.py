"""What the documents of a step say of results of another run that stood in for its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..layout.checks import is_whole
from ..record import Json
from .step import Step


def overflowed(step: Step) -> Counter[str]:
    """How many results have numbers beyond the range of the model's dtype, by what to what.

    Of several ranks, those of the rank that has most.
    """
    found: Counter[str] = Counter()
    for document in step.documents.values():
        found |= _overflowed(document)
    return found


def _overflowed(document: Json) -> Counter[str]:
    told = document.get("injected")
    counts = told.get("overflowed") if isinstance(told, Mapping) else None
    if not isinstance(counts, Mapping):
        return Counter()
    return Counter({str(what): count for what, count in counts.items() if is_whole(count)})
