"""Where the time goes: what the parts of a captured prefill cost by themselves, in memcpys of its bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import xxhash

from tlcore_backends.pt.encode import encode

from .capturing import Memcpy, distinct, raw, write_plainly_s
from .rows import Row, Scale
from .timing import interleaved, ratio, timed
from .workload import workload


def table(scale: Scale) -> list[Row]:
    """One row a part; each runs alone on one thread."""
    work = workload("prefill", scale)
    placed = work.placed()
    tensors = [tensor for _, tensor in placed]
    own = distinct(tensors)
    memcpy = Memcpy(tensors)
    everything, payloads = [raw(tensor) for tensor in tensors], [raw(tensor) for tensor in own]
    calls = list(dict.fromkeys(name.partition("/")[0] for name, _ in placed))
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        times = interleaved(
            {
                "memcpy": memcpy.seconds,
                f"xxh3-128 of {len(everything)} tensors": lambda: timed(
                    lambda: [xxhash.xxh3_128_hexdigest(data) for data in everything]
                ),
                f"CRC-32 of the {len(payloads)} distinct": lambda: timed(
                    lambda: [zlib.crc32(data) for data in payloads]
                ),
                "encoding those as .pt, CRC-32 included": lambda: timed(
                    lambda: [encode(t.dtype, tuple(t.shape), raw(t)) for t in own]
                ),
                "os.write of those into one file": lambda: write_plainly_s(own, directory),
                f"making {len(calls)} directories, {2 * len(calls) + len(own)} empty files, renamed": (
                    lambda: _make_files_s(calls, len(own), directory)
                ),
            },
            scale.repeats,
        )
    return [
        Row(f"{part} / memcpy of all", ratio(times, part, "memcpy"), None, "memcpys", "")
        for part in times
        if part != "memcpy"
    ]


def _make_files_s(calls: Sequence[str], tensors: int, directory: Path) -> float:
    """Seconds to make the files that the ``pt`` layout has, all of them empty."""
    root = directory / "files"

    def make() -> None:
        root.mkdir()
        for call in calls:
            (root / call).mkdir()
        names = [f"{root}/{call}/{stem}" for call in calls for stem in ("inputs.json", "outputs.json")]
        names += [f"{root}/{calls[index % len(calls)]}/{index}.pt" for index in range(tensors)]
        for name in names:
            os.close(os.open(f"{name}.tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            os.rename(f"{name}.tmp", name)

    seconds = timed(make)
    shutil.rmtree(root)
    return seconds
