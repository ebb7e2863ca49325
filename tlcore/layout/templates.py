"""JSON texts of a step: rendered once for each form that a call takes, then only completed.

A model repeats itself: from step to step the same modules are called with the same structures, and only
the step's number, hashes and places differ. What repeats is kept as finished text.
"""

from __future__ import annotations

import json
import operator
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from json.encoder import encode_basestring_ascii
from typing import Any

Json = dict[str, Any]

# Stands for the step's directory in a text that is made before the step is known.
STEP_DIR = f"<step-{secrets.token_hex(16)}>"
# Stands for a value that is known only when the step's tensors have been looked at.
HOLE = f"<hole-{secrets.token_hex(16)}>"

quoted = encode_basestring_ascii
# Made once: `json.dumps` makes one for each text.
_encode = json.JSONEncoder(separators=(",", ":")).encode
_STRING = re.compile(r'("(?:[^"\\]|\\.)*")')
# What stands between a document's strings, in one line and in many.
_indented: dict[tuple[str, ...], list[str]] = {}
_MOST_INDENTED, _LONGEST_INDENTED = 256, 512
_QUOTED_HOLE = quoted(HOLE)


def compact(document: Any) -> str:
    """JSON for programs, in one line, without a line end."""
    return _encode(document)


def readable(document: Any) -> str:
    """JSON for people, one key a line: what ``json.dumps`` makes, more slowly, with ``indent=1``."""
    return _readable(compact(document))


def _readable(text: str) -> str:
    pieces = _STRING.split(text)
    # What stands between the strings is alike in most documents.
    between = tuple(pieces[::2])
    known = _indented.get(between)
    if known is None:
        known = _indent(between)
        if len(between) <= _LONGEST_INDENTED:
            if len(_indented) >= _MOST_INDENTED:
                _indented.clear()
            _indented[between] = known
    pieces[::2] = known
    return "".join(pieces)


def _indent(pieces: Sequence[str]) -> list[str]:
    """What stands between the strings of a compact text, in lines."""
    found, depth, opened = list[str](), 0, False
    for piece in pieces:
        lines = list[str]()
        for each in piece:
            if each in "]}":
                depth -= 1
                lines.append(each if opened else f"\n{' ' * depth}{each}")
            else:
                if opened:
                    lines.append(f"\n{' ' * depth}")
                depth += each in "[{"
                lines.append(f",\n{' ' * depth}" if each == "," else ": " if each == ":" else each)
            opened = each in "[{"
        if opened and len(found) + 1 < len(pieces):
            # A string follows.
            lines.append(f"\n{' ' * depth}")
            opened = False
        found.append("".join(lines))
    found[-1] += "\n"
    return found


class Template:
    """One structure document in which the step's directory, written `STEP_DIR`, is still open.

    ``kind`` is the template itself, or another one that differs in how many rows stored tensors have.
    """

    __slots__ = ("_compact", "_kind", "_readable", "_text")

    def __init__(self, text: str | Callable[[], str], kind: Template | None = None) -> None:
        """``text`` is `compact` of the document, or makes it when it is asked for."""
        self._text = text
        self._kind = kind
        self._compact: list[str] | None = None
        self._readable: list[str] | None = None

    @property
    def kind(self) -> Template:
        """What all templates that differ in rows alone have in common."""
        return self if self._kind is None else self._kind

    def compact(self, step_dir: str) -> str:
        """The document in one line."""
        if self._compact is None:
            text = self._text if isinstance(self._text, str) else self._text()
            self._compact, self._text = text.split(STEP_DIR), ""
        return step_dir.join(self._compact)

    def readable(self, step_dir: str) -> str:
        """The document with one key a line."""
        if self._readable is None:
            self._readable = _readable(self.compact(STEP_DIR)).split(STEP_DIR)
        return step_dir.join(self._readable)


class Templates(dict[str, Template]):
    """The templates of a step by name (``<call dir>/inputs.json``), and the text that packs them all."""

    def __init__(self, templates: Mapping[str, Template] | None = None) -> None:
        super().__init__(templates or {})
        self._packed: tuple[str, list[str]] | None = None

    def packed(self, step_dir: str, suffix: str) -> str:
        """All documents as one JSON object in one line; ``suffix`` is a rank's, put before ``.json``."""
        if self._packed is None or self._packed[0] != suffix:
            named = (
                f"{quoted(name.removesuffix('.json') + suffix + '.json')}:{template.compact(STEP_DIR)}"
                for name, template in self.items()
            )
            self._packed = suffix, f"{{{','.join(named)}}}".split(STEP_DIR)
        return step_dir.join(self._packed[1])


class Structures(Mapping[str, Json]):
    """A step's structure documents by name (``<call dir>/inputs.json``), each made when it is asked for.

    ``values`` has the JSON texts that belong in the templates' holes (`HOLE`), by name and in order.
    """

    def __init__(
        self, step_dir: str, templates: Templates, values: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._step_dir = step_dir
        self._templates = templates
        self._values = values or {}

    def __getitem__(self, name: str) -> Json:
        document: Json = json.loads(self.compact(name))
        return document

    def __iter__(self) -> Iterator[str]:
        return iter(self._templates)

    def __len__(self) -> int:
        return len(self._templates)

    @property
    def templates(self) -> Sequence[Template]:
        """All templates, in order."""
        return list(self._templates.values())

    def template(self, name: str) -> Template:
        """One document's template."""
        return self._templates[name]

    @property
    def values_in_order(self) -> list[str]:
        """The JSON texts that fill all templates' holes, in order."""
        values = self._values
        return [text for name in self._templates for text in values.get(name, ())] if values else []

    def compact(self, name: str) -> str:
        """One document's JSON text in one line."""
        return self._filled(self._templates[name].compact(self._step_dir), (name,))

    def packed(self, suffix: str) -> str:
        """All documents as one JSON object in one line; ``suffix`` is a rank's, put before ``.json``."""
        return self._filled(self._templates.packed(self._step_dir, suffix), self._templates)

    def readable(self, name: str) -> str:
        """One document's JSON text, one key a line."""
        return self._filled(self._templates[name].readable(self._step_dir), (name,))

    def _filled(self, text: str, names: Iterable[str]) -> str:
        if not self._values:
            return text
        values = [value for name in names for value in self._values.get(name, ())]
        first, *others = text.split(_QUOTED_HOLE)
        return first + "".join(map(operator.add, values, others))


class LateStructures(Mapping[str, Json]):
    """`Structures` that ``make`` gives when they are first asked for; raises what it does."""

    def __init__(self, make: Callable[[], Structures]) -> None:
        self._make = make

    @cached_property
    def made(self) -> Structures:
        """All of them."""
        return self._make()

    def __getitem__(self, name: str) -> Json:
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def structures_of(step_dir: str, documents: Mapping[str, Json]) -> Structures:
    """`Structures` of finished documents."""
    if isinstance(documents, LateStructures):
        return documents.made
    if isinstance(documents, Structures):
        return documents
    return structures_of_texts(step_dir, {name: compact(each) for name, each in documents.items()})


def structures_of_texts(step_dir: str, texts: Mapping[str, str]) -> Structures:
    """`Structures` of finished documents' texts, as `compact` makes them."""
    return Structures(step_dir, Templates({name: Template(text) for name, text in texts.items()}))
