"""Odd models: both halves store the same bytes, and what a model returns never changes."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.deep import DEEP
from tests.hotpath.halves import native
from tests.hotpath.odd_models import ALL
from tests.hotpath.test_bytes import TWINS
from tlcore.engine.hooks import collector
from tlcore.engine.pipeline import processor
from tlcore.hotpath.looking import can_look

pytestmark = pytest.mark.slow

SEGMENTS = {"name": "safetensors", "commit_s": 600}
# The second with so little staging memory that it is used again within a step.
WAYS: list[dict[str, Any]] = [
    {"backend": "pt"},
    {"backend": SEGMENTS, "log_post_fwd_inputs": True, "queue_bytes": 1 << 14, "block_s": 60},
]


def run(name: str, keys: dict[str, Any] | None) -> tuple[list[Any], dict[str, bytes]]:
    """What two calls of a model return, and the files of their run where it is captured."""
    torch.manual_seed(0)
    model = ALL[name]()

    def call() -> list[Any]:
        return [model(torch.arange(6.0).view(2, 3) + step) for step in range(2)]

    if keys is None:
        return call(), {}
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "time_text", lambda _: "2000-01-01T00:00:00Z")
        with tlcore.capture(model, output_dir=directory, log_step_ids=[], **keys) as capture:
            returned = call()
        ledger = capture.ledger
        assert ledger.balanced and ledger.captured and not ledger.failed + ledger.dropped
        tlcore.open_run(capture.url).verify()
        files = [each for each in Path(capture.url).rglob("*") if each.is_file() and each.name != "run.json"]
        return returned, {str(path.relative_to(capture.url)): path.read_bytes() for path in files}


@pytest.mark.parametrize("inference", [False, True] if DEEP else [False])
@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize("name", ALL)
def test_both_halves_store_the_same(name: str, way: int, inference: bool) -> None:
    native()
    if name == "model_outputs":
        pytest.importorskip("transformers")
    assert can_look()
    with torch.inference_mode(inference), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, _ = run(name, None)
        returned, files = run(name, WAYS[way])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collector, "can_look", lambda: False)
            patch.setattr(processor, "hex_digests", TWINS["hex_digests"])
            others, expected = run(name, WAYS[way])
    for each in (returned, others):
        assert all(torch.equal(one, other) for one, other in zip(plain, each, strict=True))
    assert files.keys() == expected.keys()
    for file, content in files.items():
        assert content == expected[file], file
