"""Structures that were found sound, and come again in every layer and step with other files' names."""

from __future__ import annotations

import hashlib
import json
import marshal
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from ..errors import ReadError
from ..layout.names import step_dir
from ..layout.run_files import is_plain, parse
from ..layout.templates import compact
from ..protocols import StructureKind, SupportsStructureTexts
from ..record import Json
from .documents import check_structure, children

# Each takes a digest, or a short text, and the names of its files without their directory.
_MOST = 1 << 14
_SHORT = 512


class SoundStructures:
    """Texts of structures that were found sound, without the directory of the files that they refer to."""

    def __init__(self) -> None:
        self._known: dict[bytes | int, list[str]] = {}
        self._compact: dict[bytes | int, list[str]] = {}
        self._documents: dict[tuple[int, bytes], list[str]] = {}
        self._kinds: set[Hashable] = set()
        # Nothing that is stored has this in it.
        self._here = os.urandom(16)

    def files(self, text: bytes | None, directory: str) -> list[str] | None:
        """The files that a sound structure refers to; None for a text that is not known."""
        if text is None or not is_plain(text):
            return None
        names = self._known.get(_key(text, directory))
        return None if names is None else [directory + name for name in names]

    def documents(
        self,
        source: object,
        step: int,
        rank: int,
        names: Sequence[str],
        read: Callable[[int, int, str], Json],
    ) -> list[Json]:
        """Sound structures, from their texts where these are known; ``read`` checks all others."""
        found: list[Json] = []
        for name, text, directory in _with_directories(source, step, rank, names):
            if text is not None and self.files(text, directory) is not None:
                found.append(json.loads(text))
            else:
                found.append(read(step, rank, name))
                self.learn(text, directory)
        return found

    def texts(
        self,
        source: object,
        step: int,
        rank: int,
        names: Sequence[str],
        read: Callable[[int, int, str], Json],
    ) -> list[str]:
        """The same in one line each, as `tlcore.layout.templates.compact` has them."""
        found: list[str] = []
        for name, text, directory in _with_directories(source, step, rank, names):
            # Others stand in escapes.
            plain = text is not None and is_plain(text) and directory.isascii()
            key: bytes | int = _key(text, directory) if text is not None and plain else b""
            if key in self._compact:
                found.append(directory.join(self._compact[key]))
                continue
            found.append(compact(read(step, rank, name)))
            self.learn(text, directory)
            pieces = found[-1].split(directory)
            # What is known has its directory where the names of files begin, and nowhere else.
            if plain and len(pieces) - 1 == len(self._known.get(key, pieces)):
                self._compact[key] = pieces
        return found

    def learn(self, text: bytes | None, directory: str) -> None:
        """Remember a sound structure's text, where another directory in it makes one of the same kind.

        That is so where the directory stands only where the names of files begin.
        """
        if text is None or not is_plain(text) or not is_plain(directory.encode()):
            return
        try:
            files = _alone(check_structure(parse(text, ""), ""), directory)
        except ReadError:
            return
        if files is None or text.count(directory.encode()) != len(files):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
            self._compact.clear()
        self._known[_key(text, directory)] = [file.removeprefix(directory) for file in files]

    def files_of(self, document: Any, directory: str) -> list[str] | None:
        """The files that a sound structure refers to; None for one that is not known."""
        names = self._documents.get(self._form(_marshalled(document), directory))
        return None if names is None else [directory + name for name in names]

    def is_known(self, each: StructureKind) -> bool:
        """Whether a structure's kind is one that is sound; the first of each is looked at."""
        if each.kind not in self._kinds:
            try:
                check_structure(each.make(), "")
            except ReadError:
                return False
            if len(self._kinds) >= _MOST:
                self._kinds.clear()
            self._kinds.add(each.kind)
        return True

    def learn_document(self, document: Json, directory: str) -> None:
        """Remember a sound structure, as `learn` does a text."""
        files, marshalled = _alone(document, directory), _marshalled(document)
        if files is None or not marshalled or marshalled.count(directory.encode()) != len(files):
            return
        if len(self._documents) >= _MOST:
            self._documents.clear()
        names = [file.removeprefix(directory) for file in files]
        self._documents[self._form(marshalled, directory)] = names

    def _form(self, marshalled: bytes, directory: str) -> tuple[int, bytes]:
        # As the length is the same, another directory in the place of this one makes the same of all else.
        text = marshalled.replace(directory.encode(), self._here)
        return len(directory), hashlib.blake2b(text, digest_size=20).digest()


def _marshalled(document: Any) -> bytes:
    """All of a document; nothing of one that is nested far too deep, or has what no JSON has."""
    try:
        # Unlike equality, this tells 1 from 1.0 and from true; version 2 has no references.
        return marshal.dumps(document, 2)
    except ValueError:
        return b""


def _alone(structure: Json, directory: str) -> list[str] | None:
    """The files of a structure if each begins with its directory, which stands in none of them again."""
    files = list(files_in(structure))
    alone = all(file.startswith(directory) and file.count(directory) == 1 for file in files)
    return files if alone else None


def _key(text: bytes, directory: str) -> bytes | int:
    text = text.replace(directory.encode(), b"\0")
    if len(text) <= _SHORT:
        return text
    # A number, so that no text is taken for the digest of another.
    return int.from_bytes(hashlib.blake2b(text, digest_size=20).digest(), "little")


def files_in(node: Json) -> Iterator[str]:
    """Every tensor file that a structure refers to."""
    if node["type"] == "tensor" and "file" in node:
        yield node["file"]
    for child in children(node):
        yield from files_in(child)


def _with_directories(
    source: object, step: int, rank: int, names: Sequence[str]
) -> Iterator[tuple[str, bytes | None, str]]:
    """Each structure's name, its `structure_texts`, and the directory of its own files."""
    for name, text in zip(names, structure_texts(source, step, rank, names), strict=True):
        yield name, text, f"{step_dir(step)}/{name.rpartition('/')[0]}/"


def structure_texts(source: object, step: int, rank: int, names: Sequence[str]) -> Sequence[bytes | None]:
    """The bytes of structures as a source has them stored; None for what must be asked for by itself."""
    # Whatever is wrong is told when a structure is asked for by itself.
    with suppress(Exception):
        if isinstance(source, SupportsStructureTexts):
            texts = source.structure_texts(step, rank, names)
            if len(texts) == len(names) and all(text is None or type(text) is bytes for text in texts):
                return texts
    return [None] * len(names)
