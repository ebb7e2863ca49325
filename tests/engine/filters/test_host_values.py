"""Small tensors' values on the host, and what is read of a batch's masks, tokens and positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tlcore.engine.filters.batches import Batch, UnknownRowsError, check_positions, mask_flags, token_ids
from tlcore.engine.filters.host_values import HostValues, together
from tlcore.engine.filters.sequences import entries_of

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])
KINDS = [torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_read_together_have_their_own_values(kind: torch.dtype) -> None:
    tensors = [MASK.to(kind).T, IDS.to(torch.int32), torch.empty(0, 2, dtype=torch.int64)]
    for found, tensor in zip(together(tensors), tensors, strict=True):
        assert found.tolist() == tensor.float().tolist()


def test_what_lies_on_the_host_is_not_copied() -> None:
    values = HostValues({"a": MASK, "b": IDS})
    assert np.shares_memory(values["b"], IDS.numpy()) and values["a"] is values["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_batch_is_told_is_kept_when_the_model_overwrites_it(kind: torch.dtype) -> None:
    ids, mask = IDS.clone(), MASK.clone().to(kind)
    batch = Batch(ids, mask, None, None)
    flags, tokens = mask_flags(batch, 0), token_ids(batch)
    ids.zero_()
    mask.zero_()
    assert flags.tolist() == MASK.bool().tolist()
    assert tokens is not None and tokens.tolist() == IDS.tolist()


@pytest.mark.parametrize("value", [2, -1, float("nan"), float("-inf"), 0.5])
def test_a_mask_of_other_values_is_refused(value: Any) -> None:
    mask = torch.tensor([[value, 1, 1], [1, 1, 1]])
    with pytest.raises(UnknownRowsError, match="other than 0 and 1"):
        mask_flags(Batch(IDS, mask, None, None), 0)


def test_positions_may_leap_over_padding_and_begin_nowhere_anew() -> None:
    real = np.array([[False, True, True], [True, True, True]])
    for positions in ([[0, 0, 1], [0, 1, 2]], [[1, 1, 2], [3, 5, 9]]):
        check_positions(Batch(IDS, None, torch.tensor(positions), None), real)
    for positions in ([[0, 0, 1], [0, 1, 0]], [[0, 1, 1], [0, 1, 2]]):
        with pytest.raises(UnknownRowsError, match="begin anew"):
            check_positions(Batch(IDS, None, torch.tensor(positions), None), real)


def test_runs_of_positions_are_found_as_by_looking_at_each() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        real = random.random((3, 6)) < random.random()
        positions = np.cumsum(real, 1) - 1
        expected: list[dict[str, Any]] = []
        for sample, request in enumerate(["a", None, "c"]):
            for place in range(6):
                if request is None or not real[sample, place]:
                    continue
                if place and real[sample, place - 1]:
                    expected[-1]["rows"] += 1
                    continue
                entry = {"request_id": request, "first_row": sample * 6 + place, "rows": 1}
                expected.append({**entry, "first_position": int(positions[sample, place]), "sequence": "x"})
        assert entries_of(["a", None, "c"], real, positions, {"sequence": "x"}) == expected


@pytest.mark.gpu
def test_a_batch_on_a_device_is_read_in_one_transfer() -> None:
    batch = Batch(IDS.cuda(), MASK.cuda(), MASK.cumsum(1).cuda(), None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        flags = mask_flags(batch, 0)
        check_positions(batch, flags)
        assert token_ids(batch) is not None
    assert sum("Memcpy DtoH" in event.key and event.count for event in profile.key_averages()) == 1
