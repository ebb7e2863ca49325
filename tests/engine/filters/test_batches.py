"""Calls whose arguments are no batch of sequences are told by a look at them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlcore.engine.filters.batches import is_no_batch
from tlcore.engine.filters.samples import Samples
from tlcore.engine.filters.sequences import Taker, Whole

_FLAT, _DEEP, _IDS = torch.zeros(4, 8), torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"input": _FLAT},
        {"input": torch.zeros(())},
        {"x": _FLAT, "encoder_hidden_states": _FLAT},
        {"input_ids": _FLAT, "inputs_embeds": _FLAT},
    ],
    ids=str,
)
def test_of_such_a_call_the_long_way_tells_nothing_either(given: dict[str, Any]) -> None:
    assert is_no_batch(given)
    samples = Samples()
    names = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids")
    whole = Whole(True, False, frozenset(), frozenset(), frozenset())
    for parameters in (names, names[:3], ("input",)):
        scope = samples.scope(Taker("", parameters, whole), given, None)
        assert (scope.sets, scope.known) == ((), {})
    assert not samples.document() and not samples.problems


@pytest.mark.parametrize(
    "given",
    [
        {"input": _DEEP},
        {"input": _IDS},
        {"input": _FLAT, "attention_mask": torch.ones(4, 8)},
        {"input": _FLAT, "cache": None},
        {"input": [_FLAT]},
        {"input": torch.nn.Parameter(_FLAT)},
    ],
    ids=lambda given: "+".join(given),
)
def test_what_may_be_a_batch_is_looked_at(given: dict[str, Any]) -> None:
    assert not is_no_batch(given)
