"""What a step's records and structures look like when nothing is left in them that changes with the step."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from tlcore.layout.names import PathKey
from tlcore.layout.templates import HOLE, STEP_DIR, Structures, Template, compact, quoted
from tlcore.record import Direction, Json, Origin, Record

if TYPE_CHECKING:
    import torch

# Stands for a value that each step states by itself.
VALUE = {"?": 0}
# A name in the step's own directory.
HERE = "./"
_MOST_KNOWN = 50_000


class Slot(NamedTuple):
    """One tensor of a step as all steps have it, but for its bytes.

    ``tail`` is its logical name without the step's directory, ``text`` its entry in the index, open at its
    end; ``rows`` are the extent of its first dimension (1 without dimensions), ``row`` the others.
    """

    tail: str
    origin: Origin
    text: str
    dtype: torch.dtype
    rows: int
    row: tuple[int, ...]
    nbytes: int


class _Known(NamedTuple):
    """A structure's text, the tensors it refers to, and its template, so that no other can get its id.

    ``whole`` says that nothing is left of its tensors in the text.
    """

    template: Template
    name: str
    text: str
    tails: frozenset[str]
    whole: bool


class _Kind(NamedTuple):
    """What is left of structures that differ in their own directory alone, and their tensors' forms."""

    text: str
    tensors: Mapping[str, tuple[object, ...]]


class Describer:
    """Slots and structures, each described once however many steps and segments have it."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, Origin], Slot] = {}
        self._templates: dict[int, _Known] = {}
        self._kinds: dict[str, _Kind] = {}

    def slot(self, record: Record) -> Slot:
        """The slot that a record fills."""
        key = record.name.partition("/")[2], record.origin
        slot = self._slots.get(key)
        if slot is None:
            if len(self._slots) > _MOST_KNOWN:
                self._slots.clear()
            slot = self._slots[key] = self._slot(*key)
        return slot

    def _slot(self, tail: str, origin: Origin) -> Slot:
        base = self._slots.get((tail, origin.kind)) if origin.kind is not None else None
        if base is None:
            return _slot(tail, origin)
        nbytes = math.prod(origin.shape) * origin.dtype.itemsize
        rows = origin.shape[0] if origin.shape else 1
        return Slot(tail, origin, base.text, base.dtype, rows, base.row, nbytes)

    def structure(
        self, structures: Structures, name: str, step_dir: str, origins: Mapping[str, Origin]
    ) -> str:
        """The JSON text ``[name, document]`` of a structure; ``origins`` are the step's records' by tail."""
        template = structures.template(name)
        kind = template.kind
        known = self._templates.get(id(kind))
        if (
            known is not None
            and (known.whole or kind is template)
            and known.template is kind
            and known.name == name
            and known.tails <= origins.keys()
        ):
            return known.text
        whole_text = template.compact(STEP_DIR)
        left, tails = self._freed(whole_text, name, step_dir, origins)
        text = f"[{quoted(name)},{left}]"
        # Each tensor's file has the step's directory once: all of them are told by records.
        whole = len(tails) == whole_text.count(STEP_DIR)
        if step_dir not in text and (whole or kind is template):
            if len(self._templates) > _MOST_KNOWN:
                self._templates.clear()
            self._templates[id(kind)] = _Known(kind, name, text, frozenset(tails), whole)
        return text

    def _freed(
        self, text: str, name: str, step_dir: str, origins: Mapping[str, Origin]
    ) -> tuple[str, Collection[str]]:
        """What is left of a structure, and the tensors that it refers to; of each kind one is looked at."""
        directory = name.rpartition("/")[0]
        # As each file of its own begins; a directory with escapes is none that a text has so.
        own = next((f'"{each}/{directory}/' for each in (STEP_DIR, step_dir) if f'"{each}/' in text), HOLE)
        key = text.replace(own, HERE)
        if HERE in text or STEP_DIR in key or step_dir in key:
            return _freed(text, name, step_dir, origins)
        known = self._kinds.get(key)
        if known is not None:
            tails = {f"{directory}/{stem}": form for stem, form in known.tensors.items()}
            if all(_form(origins.get(tail)) == form for tail, form in tails.items()):
                return known.text, tails
        left, found = _freed(text, name, step_dir, origins)
        if len(found) == text.count(own):
            if len(self._kinds) > _MOST_KNOWN:
                self._kinds.clear()
            forms = {tail.rpartition("/")[2]: _form(origins[tail]) for tail in found}
            self._kinds[key] = _Kind(left, forms)
        return left, found


def _freed(text: str, name: str, step_dir: str, origins: Mapping[str, Origin]) -> tuple[str, set[str]]:
    freeing = _Freeing(name, step_dir, origins)
    return compact(freeing.free(json.loads(text))), freeing.tails


def _form(origin: Origin | None) -> tuple[object, ...]:
    return () if origin is None else (origin.dtype, origin.shape, origin.device)


def _slot(tail: str, origin: Origin) -> Slot:
    shape = origin.shape
    call = f'{{"name":{quoted(tail)},"module":{quoted(origin.module)},"call":{origin.call:d}'
    form = origin.direction, origin.path, origin.dtype, shape[1:], not shape, origin.device
    return Slot(
        tail,
        origin,
        f"{call},{_form_text(*form, origin.placements, origin.original)}",
        origin.dtype,
        shape[0] if shape else 1,
        shape[1:],
        math.prod(shape) * origin.dtype.itemsize,
    )


# Of the tensors of all calls of a model few differ in this.
@lru_cache(maxsize=1024, typed=True)
def _form_text(direction: Direction, path: tuple[PathKey, ...], *form: Any) -> str:
    """What stands in a slot's entry behind its call, open at its end."""
    dtype, row, is_scalar, *others = form
    shape = () if is_scalar else (1, *row)
    entry = Origin(0, "", 0, direction, path, dtype, shape, *others).describe()
    entry["shape"] = [None, *row] if shape else []
    # Known from dtype and shape; its place among the keys is kept.
    entry["bytes"] = None
    return compact({key: value for key, value in entry.items() if key not in ("module", "call")})[1:-1]


class _Freeing:
    """Takes out of a structure what the step's records say by themselves."""

    def __init__(self, name: str, step_dir: str, origins: Mapping[str, Origin]) -> None:
        self._directory = name.rpartition("/")[0]
        self._step_dir = step_dir
        self._origins = origins
        self.tails: set[str] = set()

    def free(self, node: Any) -> Any:
        """The node without it."""
        if node == HOLE:
            return VALUE
        if isinstance(node, list):
            return [self.free(child) for child in node]
        if not isinstance(node, dict):
            return node
        if node.get("type") != "tensor":
            return {key: self.free(child) for key, child in node.items()}
        node = {key: self._here(value) if key in ("file", "name") else value for key, value in node.items()}
        tail = str(node.get("file")).removeprefix(HERE).removesuffix(".pt")
        if self._is_said_by(self._origins.get(tail), tail, node):
            self.tails.add(tail)
            more = {key: self.free(node[key]) for key in list(node)[len(STORED_KEYS) :]}
            return {"tensor": tail.rpartition("/")[2], **more}
        return {key: self.free(child) for key, child in node.items()}

    def _is_said_by(self, origin: Origin | None, tail: str, node: Json) -> bool:
        if origin is None or tail.rpartition("/")[0] != self._directory:
            return False
        return (
            list(node)[: len(STORED_KEYS)] == list(STORED_KEYS)
            and node["file"] == f"{HERE}{tail}.pt"
            and (
                node["shape"] == list(origin.shape)
                and node["dtype"] == str(origin.dtype)
                and node["numel"] == math.prod(origin.shape)
                and node["device"] == origin.device
            )
        )

    def _here(self, value: Any) -> Any:
        for begin in (STEP_DIR, self._step_dir):
            if isinstance(value, str) and value.startswith(f"{begin}/"):
                return HERE + value[len(begin) + 1 :]
        return value


# The keys of a stored tensor's node that its record says as well, in their order.
STORED_KEYS = ("type", "shape", "dtype", "numel", "device", "file")


def restored(node: Any, name: str, step_dir: str, records: Mapping[str, Json], values: Any) -> Any:
    """The structure ``name`` of a step again; ``records`` are its records by name, ``values`` an iterator.

    Raises KeyError for a tensor that has no record, StopIteration when values are missing.
    """
    if isinstance(node, list):
        return [restored(child, name, step_dir, records, values) for child in node]
    if not isinstance(node, dict):
        return node
    if node == VALUE and type(node["?"]) is int:
        return next(values)
    stem = node.get("tensor")
    if isinstance(stem, str):
        record = records[f"{step_dir}/{name.rpartition('/')[0]}/{stem}"]
        shape = record["shape"]
        head = (
            *("tensor", list(shape), f"torch.{record['dtype']}"),
            *(math.prod(shape), record["device"], f"{record['name']}.pt"),
        )
        more = {
            key: restored(child, name, step_dir, records, values)
            for key, child in node.items()
            if key != "tensor"
        }
        return {**dict(zip(STORED_KEYS, head, strict=True)), **more}
    found = {key: restored(child, name, step_dir, records, values) for key, child in node.items()}
    if found.get("type") == "tensor":
        for key in ("file", "name"):
            value = found.get(key)
            if isinstance(value, str) and value.startswith(HERE):
                found[key] = f"{step_dir}/{value[len(HERE) :]}"
    return found
