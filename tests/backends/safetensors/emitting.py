"""Steps made by hand for the segments' sink, and what a reader must find of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from tlcore.layout.templates import compact
from tlcore.ledger import Counts, Ledger
from tlcore.protocols import Sink, Source
from tlcore.record import Json, Origin, Record, RunInfo, StepSummary
from tlcore.storage import Store
from tlcore_backends.safetensors.segment_sink import SegmentSink

CLOSED = {"state": "complete", "world_size": 1}
RUNNING = {"state": "running", "world_size": 1}
Tensors = Mapping[str, torch.Tensor]


def run_info(store: Store, rank: int = 0, **more: Any) -> RunInfo:
    """A run in an opened store."""
    document = {"layout": 2, "run_id": "run", "world_size": 1}
    return RunInfo("run", store.url, rank, 1, document, Ledger(), store=store, **more)


@dataclass
class Emitter:
    """Hands steps to a sink, and keeps what they were: each step's document and the bytes of its records."""

    sink: Sink
    rank: int = 0
    documents: dict[int, Json] = field(default_factory=dict)
    structures: dict[int, Json] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    origins: dict[Any, Origin] = field(default_factory=dict)

    def records(self, step: int, tensors: Tensors) -> list[Record]:
        """The records of tensors by their names without the step (``module/outputs_cpu``)."""
        first: dict[Any, str] = {}
        made = []
        for tail, tensor in tensors.items():
            module, _, stem = tail.partition("/")
            direction: Any = stem.partition("_")[0]
            key = (tail, tensor.dtype, tuple(tensor.shape))
            origin = self.origins.setdefault(
                key, Origin(self.rank, module, 0, direction, (), tensor.dtype, tuple(tensor.shape), "cpu")
            )
            flat = tensor.contiguous().reshape(-1)
            data = bytearray(flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
            digest = xxhash.xxh3_128_hexdigest(data)
            name = f"step_{step}/{tail}"
            alias = first.setdefault((digest, *key[1:]), name)
            self.data[name] = bytes(data)
            made.append(
                Record(name, step, origin, memoryview(data), digest, None if alias is name else alias)
            )
        return made

    def step(
        self,
        number: int,
        tensors: Tensors,
        rows: Sequence[Json] | None = None,
        extra: Mapping[str, Any] | None = None,
        started: str = "",
        batches: int = 1,
    ) -> None:
        """One whole step."""
        records = self.records(number, tensors)
        size = -(-len(records) // batches) or 1
        for begin in range(0, len(records), size):
            self.sink.write(records[begin : begin + size])
        for record in records:
            # Its memory is the pipeline's, which uses it again.
            if record.nbytes:
                record.data[:] = b"\xff" * record.nbytes
        self.commit(number, records, rows, extra, started)

    def commit(
        self,
        number: int,
        records: Sequence[Record],
        rows: Sequence[Json] | None = None,
        extra: Mapping[str, Any] | None = None,
        started: str = "",
    ) -> None:
        """The end of a step whose records were written."""
        structures = {
            f"{record.module}/{record.direction}.json": {
                "type": "tensor",
                "shape": list(record.shape),
                "dtype": str(record.dtype),
                "numel": record.tensor().numel(),
                "device": record.device,
                "file": f"{record.name}.pt",
            }
            for record in records
        }
        stored = len(records)
        counts = Counts(captured=stored + 1, stored=stored, skipped=1, reasons=Counter({"skipped: large": 1}))
        summary = StepSummary(
            step=number,
            rank=self.rank,
            calls=list(dict.fromkeys(record.module for record in records)),
            structures=structures,
            counts=counts,
            started=started or f"2026-01-01T00:00:{number % 60:02}.000001+00:00",
            ended=started or f"2026-01-01T00:00:{number % 60:02}.000901+00:00",
            rows=rows,
            extra=extra or {},
        )
        self.sink.commit_step(summary)
        self.documents[number] = summary.to_json([record.describe() for record in records])
        self.structures[number] = structures

    def check(self, source: Source, steps: Sequence[int] | None = None) -> None:
        """Assert that a source gives back every step (or ``steps``), key by key and byte by byte."""
        wanted = list(self.documents) if steps is None else list(steps)
        assert [step for step, ranks in source.steps.items() if self.rank in ranks.committed] == wanted
        for step in wanted:
            document = dict(source.document(step, self.rank))
            suffix = f"_rank_{self.rank}" if self.rank else ""
            ranked = {
                f"{name.removesuffix('.json')}{suffix}.json": each
                for name, each in self.structures[step].items()
            }
            assert compact(document.pop("structures")) == compact(ranked)
            document.pop("shards")
            places = []
            for record in document["records"]:
                places.append(dict(record))
                del record["shard"], record["offsets"]
            assert compact(document) == compact(self.documents[step])
            for record in places:
                assert bytes(source.read(record)) == self.data[record["name"]], record["name"]


def opened(store: Store, rank: int = 0, **options: Any) -> tuple[SegmentSink, Emitter]:
    """A sink of segments that writes into ``store``, and who hands it steps."""
    sink = SegmentSink(**options)
    sink.open(run_info(store, rank))
    return sink, Emitter(sink, rank)


def names(store: Store) -> list[str]:
    """The files of a run."""
    return sorted(entry.name for entry in store.list())
