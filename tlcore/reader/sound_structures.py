"""Structures that were found sound, and come again in every layer and step with other files' names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from ..errors import ReadError
from ..layout.names import step_dir
from ..layout.run_files import is_plain, parse
from ..protocols import SupportsStructureTexts
from ..record import Json
from .documents import check_structure, children

# Each takes a digest and the names of its files without their directory.
_MOST = 1 << 14


class SoundStructures:
    """Texts of structures that were found sound, without the directory of the files that they refer to."""

    def __init__(self) -> None:
        self._known: dict[bytes, list[str]] = {}

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
        for name, text in zip(names, structure_texts(source, step, rank, names), strict=True):
            directory = f"{step_dir(step)}/{name.rpartition('/')[0]}/"
            if text is not None and self.files(text, directory) is not None:
                found.append(json.loads(text))
            else:
                found.append(read(step, rank, name))
                self.learn(text, directory)
        return found

    def learn(self, text: bytes | None, directory: str) -> None:
        """Remember a sound structure's text, where another directory in it makes one of the same kind.

        That is so where the directory stands only where the names of files begin.
        """
        if text is None or not is_plain(text) or not is_plain(directory.encode()):
            return
        try:
            files = list(files_in(check_structure(parse(text, ""), "")))
        except ReadError:
            return
        alone = all(file.startswith(directory) and file.count(directory) == 1 for file in files)
        if not alone or text.count(directory.encode()) != len(files):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[_key(text, directory)] = [file.removeprefix(directory) for file in files]


def _key(text: bytes, directory: str) -> bytes:
    return hashlib.blake2b(text.replace(directory.encode(), b"\0"), digest_size=20).digest()


def files_in(node: Json) -> Iterator[str]:
    """Every tensor file that a structure refers to."""
    if node["type"] == "tensor" and "file" in node:
        yield node["file"]
    for child in children(node):
        yield from files_in(child)


def structure_texts(source: object, step: int, rank: int, names: Sequence[str]) -> Sequence[bytes | None]:
    """The bytes of structures as a source has them stored; None for what must be asked for by itself."""
    # Whatever is wrong is told when a structure is asked for by itself.
    with suppress(Exception):
        if isinstance(source, SupportsStructureTexts):
            texts = source.structure_texts(step, rank, names)
            if len(texts) == len(names) and all(text is None or type(text) is bytes for text in texts):
                return texts
    return [None] * len(names)
