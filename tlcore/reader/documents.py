"""What the reader believes of a run's JSON files: sizes, types and names are checked before any use.

A run may come from anybody. After these checks a name cannot leave the run or steer a terminal, a number
is a number that fits, and nothing is nested deeper than a capture writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..errors import ReadError
from ..layout.checks import LARGEST_SIZE, is_shape, is_whole
from ..layout.directions import PATTERN, is_direction
from ..layout.names import safe, step_dir
from ..layout.row_scale import is_scaled, problem_of
from ..ledger import LEDGER_COLUMNS, Counts
from ..record import NEWEST_LAYOUT, Json

# Of a run.json that no file holds, since the run is a dump of another tool.
FOREIGN = "foreign"
MOST_RANKS = 1 << 20
_DEEPEST = 300
_MOST_FIELDS = 4096

_PART = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9_.\-+=@,()\[\]%~]{1,255}"
_CALL = re.compile(_PART)
_NAME = re.compile(rf"(step_[0-9]+)/({_PART})/({_PART})")
_STRUCTURE_NAME = re.compile(rf"{_PART}/{PATTERN}(?:_rank_[1-9][0-9]*)?\.json")
ProblemOf = Callable[[Any, int], str | None]
_SCALARS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "str": (str,)}


_PLAIN = frozenset((int, float, str, bool, type(None)))


def check_layout(document: Any, where: str) -> Json:
    """A JSON object of a layout version that this reader knows. Raises ReadError for any other value."""
    layout = document.get("layout") if isinstance(document, dict) else None
    if type(layout) is not int:
        raise ReadError(f"{where}: not written by tlcore (it has no layout version)")
    if layout > NEWEST_LAYOUT:
        raise ReadError(
            f"{where}: has layout version {_short(layout)}, this tlcore reads up to {NEWEST_LAYOUT};"
            " a newer tlcore is needed"
        )
    if layout < 1:
        raise ReadError(f"{where}: has layout version {_short(layout)}, and the first one is 1")
    checked: Json = document
    return checked


def check_run(document: Any, where: str) -> Json:
    """A ``run.json``'s document. Raises ReadError for a newer layout, or what no capture writes."""
    run = check_layout(document, where)
    for key, kind in (("run_id", str), ("state", str), ("world_size", int)):
        if not isinstance(run.get(key), kind):
            raise ReadError(f"{where}: damaged, {key!r} is missing or no {kind.__name__}")
    run_id = run["run_id"]
    if safe(run_id) != run_id or run_id.startswith("."):
        # It names a directory, such as the one that `convert` writes.
        raise ReadError(f"{where}: {_short(run_id)} cannot be a run's id: it is no plain file name")
    if not is_whole(run["world_size"], 1, MOST_RANKS):
        raise ReadError(f"{where}: damaged, world_size is {_short(run['world_size'])}")
    if not isinstance(run.get("config") or {}, dict):
        raise ReadError(f"{where}: damaged, 'config' is no object")
    if _too_deep(run):
        raise ReadError(f"{where}: damaged, nested too deep")
    return run


def check_step(document: Any, where: str, number: int, problem_of: ProblemOf | None = None) -> Json:
    """A ``step.json``'s document: ledger, calls, records and names. Raises ReadError.

    ``problem_of`` is `record_problem`, or what says the same of records and remembers some.
    Where a record's bytes lie is checked when they are read, so that one bad place costs one tensor.
    """
    step = check_layout(document, where)
    for key, kind in (("calls", list), ("records", list), ("ledger", dict)):
        if not isinstance(step.get(key), kind):
            raise ReadError(f"{where}: damaged, {key!r} is missing or no {kind.__name__}")
    check_records(step["records"], where, number, problem_of)
    for call in step["calls"]:
        if not (isinstance(call, str) and _CALL.fullmatch(call)):
            raise ReadError(f"{where}: damaged, {_short(call)} is no call")
    structures = step.get("structures", {})
    if not isinstance(structures, dict) or not all(map(_STRUCTURE_NAME.fullmatch, structures)):
        raise ReadError(f"{where}: damaged structures")
    rows = step.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ReadError(f"{where}: damaged rows")
    shards = step.get("shards", [])
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise ReadError(f"{where}: damaged list of shards")
    if _too_deep([value for key, value in step.items() if key not in ("calls", "records", "structures")]):
        raise ReadError(f"{where}: damaged, nested too deep")
    check_ledger(step, where)
    return step


def check_records(records: Any, where: str, number: int, problem_of: ProblemOf | None = None) -> None:
    """Raise ReadError unless these are records of a step; ``problem_of`` as in `check_step`."""
    if not isinstance(records, list):
        raise ReadError(f"{where}: damaged, 'records' is missing or no list")
    problem_of = problem_of or record_problem
    for record in records:
        if problem := problem_of(record, number):
            raise ReadError(f"{where}: damaged record, {problem}")


def _is_shard(shard: Any) -> bool:
    return isinstance(shard, dict) and isinstance(shard.get("file"), str) and is_whole(shard.get("bytes"))


def record_problem(record: Any, number: int) -> str | None:
    """What is wrong with a record of step ``number``, or None."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return f"{_short(record)} has no name"
    name = record["name"]
    found = _NAME.fullmatch(name)
    if found is None or found[1] != step_dir(number):
        return f"{_short(name)} is not a valid name of a tensor of step {number}"
    wrong = next((key for key, right in _FIELDS.items() if not right(record.get(key))), None)
    if wrong is not None:
        return f"{wrong!r} of {_short(name)} is missing or makes no sense"
    if is_scaled(record) and (problem := problem_of(record)):
        return f"{_short(name)} has {problem}"
    if _too_deep([value for key, value in record.items() if key not in _FIELDS]):
        return f"{_short(name)} is nested too deep"
    if record.get("file", f"{name}.pt") != f"{name}.pt":
        return f"{_short(record['file'])} is not a valid name of the file of {_short(name)}"
    return None


def is_tensor_name(name: str) -> bool:
    """Whether a logical name is one that a capture gives, and cannot leave the run."""
    return _NAME.fullmatch(name) is not None


def check_ledger(document: Mapping[str, Any], where: str) -> None:
    """Raise ReadError unless the document's ledger holds counts only."""
    ledger = document.get("ledger")
    if not isinstance(ledger, dict):
        raise ReadError(f"{where}: damaged ledger")
    reasons = ledger.get("reasons", {})
    counts = [ledger.get(key, 0) for key in (*LEDGER_COLUMNS, "bytes_captured", "bytes_stored")]
    if not isinstance(reasons, dict) or not all(is_whole(count) for count in (*counts, *reasons.values())):
        raise ReadError(f"{where}: damaged ledger, it holds something else than counts")


def counts_of(document: Any, where: str) -> Counts:
    """The ledger of a ``step.json``, ``run.json`` or close marker. Raises ReadError when it is damaged."""
    if not isinstance(document, dict):
        raise ReadError(f"{where}: damaged ledger")
    check_ledger(document, where)
    return Counts.from_json(document["ledger"])


def check_structure(document: Any, where: str) -> Json:
    """A tensor structure as a capture writes it. Raises ReadError, naming ``where``."""
    if not isinstance(document, dict):
        raise ReadError(f"{where}: not a tensor structure")
    if _too_deep(document):
        raise ReadError(f"{where}: not a tensor structure (nested too deep)")
    waiting: list[Any] = [document]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict) or not _sound_node(node):
            kind = node.get("type") if isinstance(node, dict) else node
            raise ReadError(f"{where}: not a tensor structure (a damaged node, {_short(kind)})")
        waiting += children(node)
    return document


def _too_deep(value: Any) -> bool:
    """Whether arrays and objects are nested deeper than any capture writes, and recursion can go."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_DEEPEST + 1):
        # One comprehension a level: this looks at every value of every document.
        level = [child for node in level for child in _inner(node) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _inner(node: Any) -> Iterable[Any]:
    """The values in a node; none where no node is among them, as in most."""
    values = node.values() if isinstance(node, dict) else node
    return () if _PLAIN.issuperset(map(type, values)) else values


def children(node: Mapping[str, Any]) -> Iterator[Any]:
    """The nodes directly below a node of a structure, keyword arguments as one of them."""
    items = node.get("items", ())
    yield from items.values() if isinstance(items, dict) else items
    if "kwargs" in node:
        yield node["kwargs"]


def _sound_node(node: Json) -> bool:
    kind = node.get("type")
    if not isinstance(kind, str):
        return False
    if kind == "tensor":
        described = is_shape(node.get("shape")) and all(isinstance(node.get(k), str) for k in _TENSOR_TEXTS)
        return (
            described
            and isinstance(node.get("file", node.get("skipped")), str)
            and not (is_scaled(node) and problem_of(node))
        )
    if kind == "dict":
        return isinstance(node.get("items"), dict)
    if kind in ("tuple", "list"):
        return isinstance(node.get("items"), list) and _sound_fields(node)
    if kind == "float":
        return _is_float(node.get("value"))
    if kind in _SCALARS:
        return type(node.get("value")) in _SCALARS[kind]
    if kind == "object":
        texts = (node.get("class"), node.get("skipped", ""))
        return all(isinstance(text, str) for text in texts) and isinstance(node.get("items", {}), dict)
    return kind == "none"


_TENSOR_TEXTS = ("dtype", "device")


def _sound_fields(node: Json) -> bool:
    """Whether a named tuple's field names, where it has any, are as many texts as it has items."""
    fields = node.get("fields")
    if fields is None:
        return True
    return (
        isinstance(fields, list)
        and len(fields) == len(node["items"]) <= _MOST_FIELDS
        and all(isinstance(field, str) for field in fields)
    )


def _is_float(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_SIZE)


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(type(key) in (int, str) for key in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, Any] = {
    "module": _is_text,
    "call": is_whole,
    "direction": is_direction,
    "path": _is_path,
    "dtype": _is_text,
    "shape": is_shape,
    "device": _is_text,
    "bytes": is_whole,
    "hash": _is_text,
    "alias_of": lambda value: value is None or isinstance(value, str),
    "converted_from": lambda value: value is None or isinstance(value, str),
    "file": lambda value: value is None or isinstance(value, str),
    "file_bytes": lambda value: value is None or is_whole(value),
}


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) <= 120 else f"{text[:117]}..."
