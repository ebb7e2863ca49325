"""Every way to speculate that this vLLM knows is tried, or cannot start on a CPU, and says why."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from tests.adapters.vllm.helpers import run_script
from tests.adapters.vllm.test_rows import DEEP, SCRIPT, WAYS

pytestmark = pytest.mark.slow
# What vLLM says.
CANNOT_START = {
    "ngram_gpu": "pin_memory=True requires a CUDA",
    "mlp_speculator": "Model architectures ['MLPSpeculatorPreTrainedModel'] are not supported",
    "dspark": "Model Runner V1 does not support: dspark speculative decoding",
}


def test_each_is_tried_or_cannot_start() -> None:
    speculative = pytest.importorskip("vllm.config.speculative")
    # They are one, by the names of the models that have it.
    own_layers = set(get_args(speculative.MTPModelTypes))
    known = set(get_args(speculative.SpeculativeMethod)) - own_layers | {"mtp"}
    tried = {way.split("-")[0] for way in WAYS + DEEP}
    assert known - tried == set(CANNOT_START)


@pytest.mark.deep
@pytest.mark.parametrize("method", CANNOT_START)
def test_it_cannot_start_on_a_cpu(method: str, tmp_path: Path) -> None:
    done = run_script(SCRIPT, str(tmp_path), method, "first", "0", "0")
    assert done.returncode != 0 and CANNOT_START[method] in done.stdout + done.stderr
