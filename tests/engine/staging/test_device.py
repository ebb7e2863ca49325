"""CUDA tensors: what is stored is what was there when the module was called, however streams race."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.engine.filters.tensors import TensorFilter, TensorSpecs
from tlcore.engine.staging.host_memory import HostPool
from tlcore.engine.staging.stager import Stager

pytestmark = pytest.mark.gpu

TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.arange(12.0, device="cuda").view(3, 4),
    "transposed": lambda: torch.arange(12.0, device="cuda").view(3, 4).t(),
    "expanded": lambda: torch.arange(4.0, device="cuda").expand(3, 4),
    "zero-dimensional": lambda: torch.tensor(7, device="cuda"),
    "zero-size": lambda: torch.empty(0, 5, dtype=torch.bfloat16, device="cuda"),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j], device="cuda").conj(),
    "negated": lambda: torch.tensor([1 + 2j, 3 - 4j], device="cuda").conj().imag,
    "bool": lambda: torch.tensor([True, False], device="cuda"),
    "bfloat16": lambda: torch.randn(5, 7, device="cuda").bfloat16(),
    "larger than a buffer": lambda: torch.arange(3 << 10, device="cuda"),
}


def stager(limit: int = 1 << 20, chunk_bytes: int = 8 << 10) -> Stager:
    pool = HostPool(limit, "block")
    pool.chunk_bytes = chunk_bytes
    return Stager(pool, 10.0)


def staged(staging: Stager, tensors: list[torch.Tensor]) -> list[bytes]:
    """Stage all, send all, and read what arrived on the host."""
    specs = TensorSpecs(TensorFilter(frozenset(), None, None))
    places = []
    for tensor in tensors:
        spec = specs.find(tensor)
        place = staging.stage(tensor, spec)
        assert place is not None
        places.append((*place, spec.nbytes))
    for chunk in staging.take(everything=True):
        chunk.ready()
    return [bytes(chunk.view[offset : offset + nbytes]) for chunk, offset, nbytes in places]


def bytes_of(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    return plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""


@pytest.mark.parametrize("kind", TENSORS)
def test_a_snapshot_has_the_tensors_bytes(kind: str) -> None:
    tensor = TENSORS[kind]()
    assert staged(stager(), [tensor]) == [bytes_of(tensor)]


def test_kernels_right_after_the_snapshot_do_not_reach_it() -> None:
    staging = stager(limit=256 << 20, chunk_bytes=8 << 20)
    tensor = torch.zeros(1 << 20, device="cuda")
    specs = TensorSpecs(TensorFilter(frozenset(), None, None))
    places = []
    for _ in range(50):
        place = staging.stage(tensor, specs.find(tensor))
        assert place is not None
        places.append(place)
        tensor.add_(1)
    for chunk in staging.take(everything=True):
        chunk.ready()
    for value, (chunk, offset) in enumerate(places):
        copy = torch.frombuffer(chunk.view[offset : offset + (4 << 20)], dtype=torch.float32)
        assert bool((copy == value).all())


def test_buffers_are_used_again_without_mixing_their_contents() -> None:
    tensors = [torch.full((1024,), float(i), device="cuda") for i in range(100)]
    assert staged(stager(), tensors) == [bytes_of(tensor) for tensor in tensors]


def test_a_model_on_another_stream_is_followed() -> None:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        tensor = torch.ones(1 << 22, device="cuda")
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        tensor.mul_(3)
        (data,) = staged(stager(limit=64 << 20, chunk_bytes=32 << 20), [tensor])
    assert bool((torch.frombuffer(bytearray(data), dtype=torch.float32) == 3).all())


def test_device_memory_is_taken_when_the_session_begins() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True)).cuda()
    with tlcore.capture(model, backend=MemorySink(), log_step_ids=[]):
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            model(torch.randn(8, 64, device="cuda"))
        assert torch.cuda.memory_allocated() - before < 1 << 20


def test_a_captured_model_on_the_device() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 2)).cuda()
    x = torch.randn(8, 64, device="cuda")
    plain = model(x)
    sink = MemorySink()
    with tlcore.capture(model, backend=sink, log_step_ids=[]) as captured:
        for _ in range(20):
            assert torch.equal(model(x), plain)
    assert captured.ledger.stored == captured.ledger.captured == 120
    first = model[0](x).cpu()
    for step in range(20):
        assert torch.equal(sink.tensors[f"step_{step}/0/outputs_cuda_0"], first)
        assert torch.equal(sink.tensors[f"step_{step}/1/outputs_cuda_0"], first.relu())


def test_inside_a_graph_capture_a_tensor_counts_as_failed() -> None:
    staging = stager()
    tensor = torch.ones(8, device="cuda")
    staging.reserve(tensor.device)
    spec = TensorSpecs(TensorFilter(frozenset(), None, None)).find(tensor)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="graph"):
        staging.stage(tensor, spec)
