"""Runs of the subjects, captured as users would, with other batches and other kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tlcore

from .subjects import SUBJECTS, batch_dependent_kernels, token_ids

# Every run has these samples, in front of others of its batch.
SAMPLES = ("first", "second")


def captured(
    out: str,
    subject: str,
    batch: int,
    seed: int = 0,
    change: Callable[[nn.Module], None] = lambda model: None,
    **keys: Any,
) -> str:
    """The URL of a run of the batch; ``change`` is made to the model before."""
    model = SUBJECTS[subject].prepare()
    change(model)
    with (
        batch_dependent_kernels(),
        torch.inference_mode(),
        tlcore.capture(model, output_dir=out, backend="safetensors", **keys) as capture,
        capture.step(rows=[*SAMPLES, *[None] * (batch - len(SAMPLES))]),
    ):
        SUBJECTS[subject].call(model, token_ids(batch, seed))
    assert not capture.ledger.failed and not capture.ledger.dropped
    return capture.url


def compiled(out: str, subject: str, batch: int) -> str:
    """The URL of a run of the compiled model, without rows: the samples are all of the batch."""
    model = SUBJECTS[subject].prepare()
    with (
        torch.inference_mode(),
        tlcore.capture(model, output_dir=out, backend="safetensors", compiled="taps") as capture,
    ):
        model.compile()
        with capture.step(rows=[*SAMPLES, *[None] * (batch - len(SAMPLES))]):
            SUBJECTS[subject].call(model, token_ids(batch))
    assert not capture.ledger.failed and not capture.ledger.dropped
    return capture.url
