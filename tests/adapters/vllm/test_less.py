"""Less of vLLM's tensors: a narrower dtype, and statistics for each channel, against the tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report
from tests.models import tiny_llama
from tlcore.reader import Request

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "less_script.py")
NAMES = ["model.layers.2/outputs_0_cpu", "model.layers.2/outputs_1_cpu", "model.norm/outputs_0_cpu"]


def _check_packed(plain: Request, packed: Request, name: str) -> None:
    """The rows from the prompt's last two positions on, no value farther off than half its row's scale."""
    first = (plain.prompt_length or 0) - 2
    assert packed.positions(name) == [at for at in plain.positions(name) if at >= first]
    assert packed.dtype_and_shape(name)[0] == "float32"
    expected = plain[name][first:]
    bound = expected.abs().amax(-1, keepdim=True) / 250 + 1e-4
    assert ((packed[name] - expected).abs() <= bound).all()


def test_narrower_tensors_and_channels_are_those_of_the_same_rows(tmp_path: Path) -> None:
    found = report(SCRIPT, str(tiny_llama()), str(tmp_path))
    runs = {name: tlcore.open_run(each["url"]) for name, each in found.items()}
    assert all(each["tokens"] == found["plain"]["tokens"] for each in found.values())
    assert all(run.ledger.balanced and run.ledger.failed == 0 for run in runs.values())
    runs["converted"].verify()
    runs["packed"].verify()
    for name in NAMES:
        rows = []
        ids = (found[way]["ids"] for way in ("plain", "converted", "packed"))
        for one, other, third in zip(*ids, strict=True):
            plain, converted = runs["plain"].request(one), runs["converted"].request(other)
            assert converted[name].dtype == torch.bfloat16
            assert torch.allclose(
                converted.tensor(name, dtype="original"), plain[name], rtol=2**-7, atol=1e-4
            )
            _check_packed(plain, runs["packed"].request(third), name)
            places = [
                at
                for at, position in enumerate(plain.positions(name))
                if position >= (plain.prompt_length or 0)
            ]
            rows.append(plain[name][places])
        values = torch.cat(rows).double()
        channels = runs["channels"].channels(name)
        assert (channels.count == len(values)).all() and len(values) == 3 * 4
        assert np.allclose(channels.mean, values.mean(0).numpy(), rtol=1e-4, atol=1e-5)
        assert np.allclose(channels.max, values.amax(0).numpy(), rtol=1e-4, atol=1e-5)
    assert runs["channels"].ledger.stored == 0 and runs["channels"].verify() == 0
