"""The structures of a step as files, all of them read together: ``step.json`` has their hash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tlcore.hotpath.beneath import read_texts
from tlcore.layout.checksums import digest_of_files
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.run_files import RunFiles
from tlcore.record import Json

from .whole_check import LARGEST_TEXTS

_REMOTE_THREADS = 8


class StructureFiles:
    """Those of the last step and rank that were looked at are kept: mostly they are read next."""

    def __init__(self, files: RunFiles) -> None:
        self._files = files
        self._last: tuple[tuple[int, int], Mapping[str, bytes]] = ((-1, -1), {})

    def known(self, step: int, rank: int) -> Mapping[str, bytes]:
        """The files that are in memory of a step; mostly none."""
        of, texts = self._last
        return texts if of == (step, rank) else {}

    def problems(self, step: int, rank: int, names: Sequence[str], document: Json) -> Iterator[str]:
        """Whether a step's structures are those that its document was written with. Raises ReadError."""
        stated = document.get("structures_hash")
        if stated is None:
            # Of an earlier version.
            return
        texts = self._read(names)
        self._last = (step, rank), texts
        if digest_of_files(texts) != stated:
            since = f"since step{rank_suffix(rank)}.json was written"
            yield f"{step_dir(step)}: a structure was changed or added, or is missing, {since}"

    def _read(self, names: Sequence[str]) -> Mapping[str, bytes]:
        directory = self._files.directory
        found: Sequence[bytes | None] = [None] * len(names)
        if directory is not None:
            found = read_texts(directory, names, LARGEST_TEXTS)
        texts = {name: text for name, text in zip(names, found, strict=True) if text is not None}
        rest = [name for name in names if name not in texts]
        if rest:
            with ThreadPoolExecutor(_REMOTE_THREADS, "tlcore-read") as pool:
                texts |= zip(rest, pool.map(self._files.json_bytes, rest), strict=True)
        return texts
