"""Whose row is whose in random mixes: chunks, preemptions, drafts, prompt logits, padding, in any order."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.deep import scaled
from tests.fuzz.mixes import complaints, run_mix
from tests.fuzz.plants import PLANTS, Rows
from tests.sinks import MemorySink
from tlcore.layout.rows import CallRows

# The tokens behind a request's end are cut off as vLLM does it.
without_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
pytestmark = [pytest.mark.slow, without_vllm]
MIXES = scaled(10, 200)


@pytest.mark.parametrize("seed", range(MIXES))
def test_every_row_of_a_mix_is_its_requests(seed: int) -> None:
    assert complaints(*run_mix(seed)) == []


@pytest.mark.parametrize("seed", range(MIXES))
def test_only_chosen_requests_are_stored(seed: int) -> None:
    asked, sink = run_mix(seed, request_ids="^[02]-")
    for name, tensor in sink.tensors.items():
        assert set(tensor[:, 0].tolist()) <= {0.0, 2.0}, name
    assert complaints([each for each in asked if each.number in (0, 2)], sink) == []


@pytest.mark.parametrize("seed", range(MIXES))
def test_of_each_step_the_last_row_is_what_the_next_token_came_from(seed: int) -> None:
    asked, sink = run_mix(seed, rows="last")
    wrong = [text for text in complaints(asked, sink) if "missing" not in text]
    assert wrong == []
    _check_that_all_stayed(sink)
    for name, tensor in sink.tensors.items():
        # A row consists of its request, position and token.
        owners = tensor[:, 0].tolist()
        assert "logits" in name or len(owners) == len(set(owners)), name


@pytest.mark.parametrize("rows", ["response", {"from": 0}, {"from": -2, "to": 30}])
@pytest.mark.parametrize("seed", range(MIXES))
def test_of_a_window_no_row_of_a_rejected_token_is_stored(seed: int, rows: Any) -> None:
    asked, sink = run_mix(seed, rows=rows)
    assert [text for text in complaints(asked, sink) if "missing" not in text] == []
    _check_that_all_stayed(sink)


def _check_that_all_stayed(sink: MemorySink) -> None:
    for step in sink.steps:
        rows = CallRows(step.to_json(()))
        for name, tensor in sink.tensors.items():
            if name.startswith(f"step_{step.step}/"):
                spans = rows.spans({"name": name, "shape": list(tensor.shape), "dtype": "float32"})
                assert spans == tuple(span.kept() for span in spans)
                assert sum(span.length for span in spans) == len(tensor)


@pytest.mark.parametrize("name", PLANTS)
def test_planted_faults_are_found(name: str) -> None:
    plant = PLANTS[name]
    planted = found = 0
    for seed in range(MIXES):
        changes = 0

        def spoil(rows: Rows) -> None:
            nonlocal changes
            before = repr(rows)
            plant(rows)
            changes += repr(rows) != before

        asked, sink = run_mix(seed, spoil)
        try:
            told = bool(complaints(asked, sink))
        except ValueError:
            # Rows that cannot be are refused by whoever reads them.
            told = True
        planted += bool(changes)
        found += told
        # Drafts that were all kept are right, whatever was believed of them.
        assert told or not changes or name == "believed"
    assert planted and found
