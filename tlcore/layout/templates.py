"""JSON texts of a step: rendered once for each form that a call takes, then only completed.

A model repeats itself: from step to step the same modules are called with the same structures, and only
the step's number, hashes and places differ. What repeats is kept as finished text.
"""

from __future__ import annotations

import json
import operator
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

Json = dict[str, Any]

# Stands for the step's directory in a text that is made before the step is known.
STEP_DIR = f"<step-{secrets.token_hex(16)}>"
# Stands for a value that is known only when the step's tensors have been looked at.
HOLE = f"<hole-{secrets.token_hex(16)}>"

quoted = encode_basestring_ascii
_QUOTED_HOLE = quoted(HOLE)


def compact(document: Any) -> str:
    """JSON for programs, in one line, without a line end."""
    return json.dumps(document, separators=(",", ":"))


def readable(document: Any) -> str:
    """JSON for people, one key a line."""
    return json.dumps(document, indent=1) + "\n"


class Template:
    """One structure document in which the step's directory, written `STEP_DIR`, is still open."""

    __slots__ = ("_compact", "_readable")

    def __init__(self, document: Json) -> None:
        self._compact = compact(document).split(STEP_DIR)
        self._readable: list[str] | None = None

    def compact(self, step_dir: str) -> str:
        """The document in one line."""
        return step_dir.join(self._compact)

    def readable(self, step_dir: str) -> str:
        """The document with one key a line."""
        if self._readable is None:
            self._readable = readable(json.loads(self.compact(STEP_DIR))).split(STEP_DIR)
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


def structures_of(step_dir: str, documents: Mapping[str, Json]) -> Structures:
    """`Structures` of finished documents."""
    if isinstance(documents, Structures):
        return documents
    return Structures(step_dir, Templates({name: Template(each) for name, each in documents.items()}))
