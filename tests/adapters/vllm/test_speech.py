"""An encoder of sounds and a decoder (Whisper): a batch gives each request what it is given alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, report

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "speech_script.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report(SCRIPT, str(tmp_path_factory.mktemp("speech")))


def test_each_request_has_the_rows_that_it_has_alone(said: dict[str, Any]) -> None:
    together = tlcore.open_run(said["all"]["url"])
    for request_id, alone in zip(said["all"]["ids"], said["alone"], strict=True):
        batched = together.request(request_id)
        own = tlcore.open_run(alone["url"]).request(alone["ids"][0])
        assert list(batched) and set(batched) <= set(own)
        for part in ("model.encoder.layer_norm/outputs", "model.decoder.layer_norm/outputs"):
            assert any(name.startswith(part) for name in batched), part
        for name in batched:
            assert batched.positions(name) == own.positions(name), name
            torch.testing.assert_close(batched[name], own[name], atol=2e-4, rtol=2e-3)


def test_requests_are_known_by_their_sounds(said: dict[str, Any]) -> None:
    """vLLM keeps no cache of these, and numbers them through."""
    result = tlcore.compare(said["all"]["url"], said["turned"]["url"], rtol=2e-3, atol=2e-4)
    assert result.equal, str(result)
    assert not tlcore.compare(said["all"]["url"], said["other"]["url"], rtol=2e-3, atol=2e-4).equal
    prompts = [
        {row["prompt_hash"] for row in tlcore.open_run(said[name]["url"]).step(0).rows or ()}
        for name in ("all", "turned", "other")
    ]
    assert prompts[0] == prompts[1] and not prompts[0] & prompts[2] and len(prompts[0]) == 3
