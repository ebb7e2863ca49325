"""A request's rows over all steps, in the order of positions, whatever vLLM did with it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranked import Rows, requests_run
from tlcore.errors import ReadError
from tlcore.reader import Gap, MissingError, Run
from tlcore.reader.request import Request

A, B = "AAA-0123abcd", "BBB-89abcdef"
# Chunked prefill of A beside decoding of B, then both decode, the other way round in the batch.
STEPS: list[Rows] = [[(A, 3, 0), (B, 1, 7)], [(B, 1, 8), (A, 2, 3)], [(A, 1, 5), (B, 1, 9)]]
BACKENDS = ["pt", "safetensors"]


def _code(request: str, position: int, step: int) -> list[float]:
    return [float(ord(request[0])), float(position), float(step)]


def _tensors(step: int, rows: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
    tokens = [
        _code(row["request_id"], row["first_position"] + i, step) for row in rows for i in range(row["rows"])
    ]
    last = [_code(row["request_id"], row["first_position"] + row["rows"] - 1, step) for row in rows]
    return {"layer": torch.tensor(tokens), "logits": torch.tensor(last), "table": torch.ones(5, 2)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_joined_in_the_order_of_positions(tmp_path: Path, backend: str) -> None:
    run = requests_run(tmp_path, STEPS, _tensors, backend=backend)
    assert run.requests == {A: "AAA", B: "BBB"}
    request = run.request("AAA")
    assert (request.request_id, request.external_id, request.steps) == (A, "AAA", [0, 1, 2])
    expected = [_code(A, position, step) for position, step in enumerate([0, 0, 0, 1, 1, 2])]
    assert request["layer/outputs_cpu"].tolist() == expected
    assert request.positions("layer/outputs_cpu") == list(range(6))
    assert not request.gaps("layer/outputs_cpu") and not request.recomputed("layer/outputs_cpu")
    for name in request.names:
        dtype, shape = request.dtype_and_shape(name)
        assert (dtype, shape) == ("float32", list(request[name].shape))
    assert "table/outputs_cpu" not in request and "layer/inputs_0_cpu" in request


def test_single_rows_are_told_by_their_positions(tmp_path: Path) -> None:
    request, name = requests_run(tmp_path, STEPS, _tensors).request("AAA"), "layer/outputs_cpu"
    assert request.row_shape(name) == (3,) and request.has_row(name, 5) and not request.has_row(name, 6)
    assert request.rows_at(name, [4, 1]).tolist() == [_code(A, 1, 0), _code(A, 4, 1)]
    with pytest.raises(MissingError, match="layer/outputs_cp"):
        request.has_row("layer/outputs_cp", 0)


def test_a_name_may_leave_out_the_device(tmp_path: Path) -> None:
    request = requests_run(tmp_path, STEPS, _tensors).request("AAA")
    for name in request.names:
        short = name.removesuffix("_cpu")
        assert torch.equal(request[short], request[name])
        assert request.positions(short) == request.positions(name)
    with pytest.raises(MissingError, match=r"no tensor with rows 'layer/output'; did you mean"):
        request["layer/output"]


def test_a_request_keeps_nothing_of_the_tensors_that_were_read(tmp_path: Path) -> None:
    count, names = 4096, ["layer/inputs_0_cpu", "layer/outputs_cpu"]
    run = requests_run(tmp_path, [[(A, count, 0)]], _tensors)

    def kept_after(request: Request) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for name in names:
            assert request[name].shape == (count, 3) and not request.gaps(name)
            assert request.dtype_and_shape(name) == ("float32", [count, 3])
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        kept_after(run.request(A))
        request = run.request(A)
        assert kept_after(request) < count * 64
    finally:
        tracemalloc.stop()


def test_a_tensor_with_a_row_for_each_request_has_one_for_each_step(tmp_path: Path) -> None:
    request = requests_run(tmp_path, STEPS, _tensors).request(A)
    assert request["logits/outputs_cpu"].tolist() == [_code(A, 2, 0), _code(A, 4, 1), _code(A, 5, 2)]
    assert request.positions("logits/outputs_cpu") == [2, 4, 5]


def test_gaps_say_whether_the_prefix_cache_had_the_positions(tmp_path: Path) -> None:
    request = requests_run(tmp_path, [[(A, 2, 4)], [(A, 1, 9)]], _tensors, {A: 4}).request("AAA")
    assert request.gaps("layer/outputs_cpu") == [Gap(0, 4, "prefix cache"), Gap(6, 9, "not captured")]
    partly = requests_run(tmp_path, [[(A, 2, 6)]], _tensors, {A: 4}).request("AAA")
    assert partly.gaps("layer/outputs_cpu") == [Gap(0, 4, "prefix cache"), Gap(4, 6, "not captured")]


def test_of_recomputed_positions_the_last_computation_counts(tmp_path: Path) -> None:
    steps: list[Rows] = [[(A, 2, 0)], [(A, 1, 2)], [(B, 1, 0)], [(A, 2, 0)], [(A, 2, 2)]]
    request = requests_run(tmp_path, steps, _tensors).request("AAA")
    assert request["layer/outputs_cpu"].tolist() == [_code(A, p, s) for p, s in enumerate([3, 3, 4, 4])]
    assert request.recomputed("layer/outputs_cpu") == [0, 1, 2]


@pytest.mark.parametrize(
    ("known", "wanted", "sample"),
    [
        ("cmpl-AAA-0-0123abcd", "AAA", None),
        ("cmpl-AAA-0-0123abcd", "cmpl-AAA-0", None),
        ("chatcmpl-AAA-0123abcd", "AAA", None),
        ("1_cmpl-AAA-0-0123abcd", "AAA", None),
        ("1_7-0123abcd", "7", 1),
        ("1_7-0123abcd", "1_7", None),
        ("embd-AAA-1-0123abcd", "AAA", None),
        ("generate-tokens-AAA-0123abcd", "AAA", None),
        ("generative-scoring-AAA-0-0123abcd", "AAA", None),
        ("chatcmpl-AAA_0-0123abcd", "AAA", None),
        ("embd-AAA-prompt-0-chunk-1-0123abcd", "AAA", None),
    ],
)
def test_a_request_is_found_by_the_id_that_its_client_gave(
    tmp_path: Path, known: str, wanted: str, sample: int | None
) -> None:
    run = requests_run(tmp_path, [[(known, 2, 0), ("other-0123abcd", 1, 0)]], _tensors)
    assert run.request(wanted, sample).request_id == known


def test_samples_are_told_apart_and_unknown_requests_named(tmp_path: Path) -> None:
    steps: list[Rows] = [[("0_AAA-0123abcd", 1, 0), ("1_AAA-0123abcd", 1, 0), ("cmpl-B-0-0123abcd", 1, 0)]]
    run = requests_run(tmp_path, steps, _tensors)
    with pytest.raises(ReadError, match="names 2 requests: 0_AAA-0123abcd, 1_AAA-0123abcd"):
        run.request("AAA")
    assert run.request("AAA", sample=1).request_id == "1_AAA-0123abcd"
    with pytest.raises(
        MissingError, match="no request 'AAB'; the run has 0_AAA-0123abcd, 1_AAA-0123abcd, cmpl-B"
    ):
        run.request("AAB")
    with pytest.raises(MissingError, match="no request '0'"):
        run.request("0")
    with pytest.raises(MissingError, match="no tensor with rows 'layr/outputs_cpu'; did you mean"):
        run.request("B")["layr/outputs_cpu"]


def test_a_run_without_rows_says_so(tmp_path: Path) -> None:
    run: Run = requests_run(tmp_path, [[]], lambda step, rows: {"layer": torch.ones(2)})
    with pytest.raises(MissingError, match="no step has the rows of requests"):
        run.request("AAA")
