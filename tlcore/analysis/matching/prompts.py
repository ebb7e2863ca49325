"""Which request of one run is which of another: ids differ from run to run, prompts do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...errors import ConfigError, ReadError
from ...reader import Step

Tokens = dict[int, int]


@dataclass(slots=True)
class Request:
    """One request of a run: its ids, the hash of its prompt, and what is known of its tokens."""

    id: str
    external_id: str | None
    prompt_hash: str | None
    first_rows: int
    tokens: Tokens = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The id that its user knows."""
        return self.external_id or self.id


def requests_of(steps: Sequence[Step]) -> list[Request]:
    """The requests of a run, in order of appearance."""
    found: dict[str, Request] = {}
    for step in steps:
        for row in step.samples:
            request = str(row["request_id"])
            if request not in found:
                # A sample's id is the user's own, or a number.
                external = row.get("external_request_id", None if "rows" in row else request)
                found[request] = Request(request, external, row.get("prompt_hash"), row.get("rows", 0))
    return list(found.values())


def pair_requests(
    steps_a: Sequence[Step], steps_b: Sequence[Step], given: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """A label for every request id of A, one for every id of B, equal for one request, and notes.

    ``given`` pairs come first, then requests with one prompt (the first with the first of several), told
    by the prompt's hash or by the captured token ids, and where a run has neither, equal external ids.
    Raises ConfigError for a given id that no request has, or several.
    """
    a, b = requests_of(steps_a), requests_of(steps_b)
    pairs = [(_named(a, one, "A"), _named(b, other, "B")) for one, other in given]
    left_a, left_b = _without(a, [x for x, _ in pairs]), _without(b, [y for _, y in pairs])
    notes: list[str] = []
    if all(request.prompt_hash for request in (*left_a, *left_b)):
        pairs += _by_hash(left_a, left_b)
    elif _learn_tokens(steps_a, left_a) and _learn_tokens(steps_b, left_b):
        pairs += _by_tokens(left_a, left_b)
    else:
        pairs += _by_external_id(left_a, left_b)
        notes.append("requests were matched by their ids, since the runs tell no prompts; see --request")
    labels_a = _labels(a)
    labels_b = {request.id: f"{label} of B" for request, label in zip(b, _labels(b).values(), strict=True)}
    labels_b |= {y.id: labels_a[x.id] for x, y in pairs}
    alone = len(a) + len(b) - 2 * len(pairs)
    if alone:
        advice = "" if pairs else "; pair them yourself with --request"
        notes.append(f"{alone} requests have no counterpart with the same prompt in the other run{advice}")
    return labels_a, labels_b, notes


def _named(requests: Sequence[Request], name: str, run: str) -> Request:
    found = [request for request in requests if name in (request.id, request.external_id)]
    if len(found) != 1:
        known = ", ".join(request.label for request in requests[:20])
        problem = "no request" if not found else f"{len(found)} requests"
        raise ConfigError("--request", f"{problem} of {run} has the id {name!r}; it has {known}")
    return found[0]


def _without(requests: Sequence[Request], taken: Sequence[Request]) -> list[Request]:
    ids = {request.id for request in taken}
    return [request for request in requests if request.id not in ids]


def _labels(requests: Sequence[Request]) -> dict[str, str]:
    """External ids, and the whole id where a client used one twice."""
    used: dict[str, int] = defaultdict(int)
    for request in requests:
        used[request.label] += 1
    return {each.id: each.label if used[each.label] == 1 else each.id for each in requests}


def _by_hash(a: Sequence[Request], b: Sequence[Request]) -> Iterator[tuple[Request, Request]]:
    prompts: dict[str, tuple[list[Request], list[Request]]] = defaultdict(lambda: ([], []))
    for side, requests in enumerate((a, b)):
        for request in requests:
            prompts[str(request.prompt_hash)][side].append(request)
    for mine, theirs in prompts.values():
        yield from _by_order(mine, theirs)


def _by_order(a: list[Request], b: list[Request]) -> Iterator[tuple[Request, Request]]:
    """Requests with one prompt: those with equal ids, then the first with the first."""
    same = list(_by_external_id(a, b))
    yield from same
    rest = _without(a, [x for x, _ in same]), _without(b, [y for _, y in same])
    yield from zip(*rest, strict=False)


def _by_external_id(a: Sequence[Request], b: Sequence[Request]) -> Iterator[tuple[Request, Request]]:
    theirs: dict[str, list[Request]] = defaultdict(list)
    for request in b:
        if request.external_id is not None:
            theirs[request.external_id].append(request)
    for request in a:
        if request.external_id is not None and theirs[request.external_id]:
            yield request, theirs[request.external_id].pop(0)


def _by_tokens(a: list[Request], b: list[Request]) -> Iterator[tuple[Request, Request]]:
    """The longest common beginnings first; the rows of a request's first step must all agree."""
    scored = []
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            common = _common(x.tokens, y.tokens)
            if common >= min(x.first_rows, y.first_rows):
                scored.append((-common, x.external_id != y.external_id, i, j))
    taken: tuple[set[int], set[int]] = (set(), set())
    for _, _, i, j in sorted(scored):
        if i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
            yield a[i], b[j]


def _common(x: Tokens, y: Tokens) -> int:
    """How many tokens agree from the first position that both know, before one differs."""
    count = 0
    for position in sorted(x.keys() & y.keys()):
        if x[position] != y[position]:
            break
        count += 1
    return count


def _learn_tokens(steps: Sequence[Step], requests: Sequence[Request]) -> bool:
    """Fill in each request's tokens from the captured token ids; False where a request has none."""
    known = {request.id: request.tokens for request in requests}
    by_id = {request.id: request for request in requests}
    for step in steps:
        entries = [each for each in step.token_entries if "sequence" not in each]
        for entry in entries:
            if (request := by_id.get(str(entry["request_id"]))) is not None:
                told = entry["ids"][: entry["kept"]]
                request.tokens.update(enumerate(told, int(entry["first_position"])))
                # A sample has no rows of its own that would say how long its prompt is.
                request.first_rows = request.first_rows or int(entry.get("prompt", len(told)))
        rows = step.rows or []
        ids = None if entries else _token_ids(step)
        for row in rows:
            tokens = known.get(row["request_id"])
            if ids is not None and tokens is not None:
                first, position = row["first_row"], row["first_position"]
                values = ids[first : first + row.get("accepted", row["rows"])]
                tokens.update(zip(range(position, position + len(values)), values, strict=True))
    return all(request.tokens for request in requests)


def _token_ids(step: Step) -> list[int] | None:
    """The token ids that the model was given: an integer for each row, that are not positions."""
    rows = step.rows or []
    total = max((row["first_row"] + row["rows"] for row in rows), default=0)
    positions = [row["first_position"] + i for row in rows for i in range(row["rows"])]
    for record in step.records:
        integers = record["dtype"] in ("int32", "int64") and record["direction"] == "inputs"
        spans = step.row_spans(record) if integers and total else ()
        one_each = spans and len(record["shape"]) == spans[0].axis + 1
        if one_each and sum(span.row["rows"] for span in spans) == total:
            try:
                values: list[int] = step.tensor(str(record["name"])).flatten().tolist()
            except ReadError:
                continue
            if values[:total] != positions:
                return values
    return None
