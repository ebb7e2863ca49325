"""The ids of a run's requests, and which of them a client's name means."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

from ..errors import MissingError, ReadError
from ..layout.names import printable
from .step import Step

# What to do where no rows are known to be anybody's.
_ROWS_TAKE = (
    "outside vLLM they take a model that is given an attention_mask, or `with capture.step(rows=[...]):`"
)
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}\Z")
# What vLLM's server puts before a client's id, where that is no single word.
_TWO_WORDS = "generate-tokens|generative-scoring"
_SAMPLE_PREFIX = re.compile(r"(\d+)_(.+)", re.DOTALL)


def why_unknown(step: Step) -> str | None:
    """Why a step does not know whose rows are whose, if it says so."""
    said = (document.get("rows_unavailable") for document in step.documents.values())
    found = next((each for each in said if isinstance(each, str)), None)
    return None if found is None else f"step {step.number} says: {printable(found)}"


def rows_take(why: str | None) -> str:
    """What to know where no rows are known to be anybody's, with what a step says of it."""
    return _ROWS_TAKE if why is None else f"{_ROWS_TAKE} ({why})"


class RequestSteps:
    """The requests of a run, in the order of their first rows, and which steps tell something of each.

    ``ids`` have the client's own where it is known. ``why_not`` is why the first step without them has none.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self.ids: dict[str, str | None] = {}
        self.why_not: str | None = None
        self._steps: dict[str, array[int]] = {}
        # Steps whose token ids make no sense: whoever asks for a request is told so.
        self._of_all: list[int] = []
        for step in steps:
            for own in self._told(step):
                found = self._steps.setdefault(own, array("q"))
                if not found or found[-1] != step.number:
                    found.append(step.number)

    def _told(self, step: Step) -> Iterator[str]:
        self.why_not = self.why_not or why_unknown(step)
        for document in step.documents.values():
            for row in (*document.get("rows", ()), *document.get("samples", ())):
                own = str(row["request_id"])
                self.ids.setdefault(own, row.get("external_request_id"))
                yield own
            try:
                yield from [str(entry["request_id"]) for entry in document.get("tokens", ())]
            except (TypeError, KeyError):
                self._of_all.append(step.number)

    def of(self, request_id: str) -> list[int]:
        """The numbers of a request's steps."""
        return sorted({*self._steps.get(request_id, ()), *self._of_all})


def find_request(requests: RequestSteps, wanted: str, sample: int | None, url: str) -> str:
    """The full id of the request that ``wanted`` names: vLLM's id, the client's, or what the server got.

    Raises MissingError when there is none, ReadError naming them when there are several.
    """
    known = requests.ids
    for matches in (_is_full, _is_external, _is_of_server, _is_of_other_routes):
        found = [each for each, external in known.items() if matches(each, external, wanted)]
        if sample is not None:
            found = [each for each in found if _sample(each) == sample]
        if len(found) == 1:
            return found[0]
        if found:
            which = f"{wanted!r} names {len(found)} requests: {_shown(found)}"
            raise ReadError(f"{url}: {which} (give the full id, or sample=0, 1, ...)")
    if not known:
        raise MissingError(f"{url}: no step has the rows of requests; {rows_take(requests.why_not)}")
    which = repr(wanted) if sample is None else f"{wanted!r} (sample {sample})"
    raise MissingError(f"{url}: no request {which}; the run has {_shown(list(known))}")


def _is_full(request_id: str, external: str | None, wanted: str) -> bool:
    return request_id == wanted


def _is_external(request_id: str, external: str | None, wanted: str) -> bool:
    # A client's own id may begin as that of a sample does.
    own = _RANDOM_SUFFIX.sub("", request_id)
    return wanted in (external, own, _without_additions(request_id))


def _is_of_server(request_id: str, external: str | None, wanted: str) -> bool:
    """``AAA`` becomes ``cmpl-AAA-0`` or ``chatcmpl-AAA`` in the server, before vLLM adds its own suffix."""
    inner = external or _without_additions(request_id)
    return re.fullmatch(rf"[a-z]+-{re.escape(wanted)}(-\d+)?", inner) is not None


def _is_of_other_routes(request_id: str, external: str | None, wanted: str) -> bool:
    """``generate-tokens-AAA`` of tokens, ``chatcmpl-AAA_0`` of a batch, ``embd-AAA-prompt-0-chunk-1``."""
    inner = external or _without_additions(request_id)
    part = r"(?:[-_]\d+|-prompt-\d+(?:-chunk-\d+)?)?"
    return re.fullmatch(rf"(?:[a-z]+|{_TWO_WORDS})-{re.escape(wanted)}{part}", inner) is not None


def _without_additions(request_id: str) -> str:
    """A request's id without vLLM's random suffix and the number of a parallel sample."""
    sample = _SAMPLE_PREFIX.fullmatch(request_id)
    return _RANDOM_SUFFIX.sub("", sample[2] if sample else request_id)


def _sample(request_id: str) -> int | None:
    sample = _SAMPLE_PREFIX.fullmatch(request_id)
    return int(sample[1]) if sample else None


def _shown(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return ", ".join(ids[:8]) + more
