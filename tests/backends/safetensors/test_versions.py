"""Which layout is written, and what is said of it."""

from __future__ import annotations

import pytest
import torch

import tlcore
from tlcore.errors import ConfigError
from tlcore_backends.safetensors import versions
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.sink import SafetensorsSink


def test_options_select_their_layout_and_contradictions_are_refused() -> None:
    assert isinstance(versions.make_sink(layout=2), SegmentSink)
    assert isinstance(versions.make_sink(commit_s=0), SegmentSink)
    assert isinstance(versions.make_sink(segment_bytes=1 << 20), SegmentSink)
    assert isinstance(versions.make_sink(shard_bytes=1 << 20), SafetensorsSink)
    for options in ({"layout": 1, "commit_s": 1}, {"layout": 2, "shard_bytes": 1}):
        with pytest.raises(ConfigError, match="has no such option"):
            versions.make_sink(**options)  # type: ignore[arg-type]


def test_a_long_capture_of_single_objects_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for number, (format, steps) in enumerate([("pt", []), ("pt", [0]), ("safetensors", [])]):
        backend = {"name": "fsspec", "format": format, "url": f"memory://warned-{number}"}
        caplog.clear()
        with tlcore.capture(module, backend=backend, log_step_ids=steps):
            module(torch.ones(2, 4))
            module(torch.ones(2, 4))
        found = [text for text in caplog.messages if "one object for each tensor" in text]
        assert len(found) == (1 if (format, steps) == ("pt", []) else 0)
