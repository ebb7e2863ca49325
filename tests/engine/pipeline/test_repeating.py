"""Steps that are like one before are written at once, and read as if each tensor had come by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.engine.pipeline.content import PLACES, content
from tests.hotpath.halves import native
from tlcore.alike import AlikeStep
from tlcore.config.configuration import load_config
from tlcore.engine.batch import StepEnd
from tlcore.engine.new_run import new_run
from tlcore.engine.pipeline import processor, repeating
from tlcore.engine.session import Session
from tlcore.errors import BackendError
from tlcore.record import StepSummary
from tlcore_backends.safetensors.segment_sink import SegmentSink

KEYS: dict[str, Any] = {"log_step_ids": [], "backend": {"name": "safetensors", "commit_s": 600}}


class Model(nn.Module):
    """Two modules, of which the second gives back its argument where that is to be an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        y = self.first(x)
        found: torch.Tensor = self.second(y if other is None else other)
        return found


def inputs(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def run(directory: Path, calls: Sequence[tuple[torch.Tensor, ...]], **keys: Any) -> tlcore.Run:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad(), tlcore.capture(model, output_dir=str(directory), **KEYS, **keys) as capture:
        for call in calls:
            model(*call)
    assert capture.ledger.balanced
    return tlcore.open_run(capture.url)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were written at once."""
    native()
    steps: list[int] = []
    plain = SegmentSink.write_alike

    def counting(sink: SegmentSink, step: AlikeStep, summary: StepSummary) -> bool:
        written = plain(sink, step, summary)
        if written:
            steps.append(step.step)
        return written

    monkeypatch.setattr(SegmentSink, "write_alike", counting)
    return steps


def both(tmp_path: Path, calls: Sequence[tuple[torch.Tensor, ...]], **keys: Any) -> tlcore.Run:
    """The run, after it was held against one in which every record came by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeating, "can_hash", False)
        plain = run(tmp_path / "plain", calls, **keys)
    found = run(tmp_path / "repeated", calls, **keys)
    found.verify()
    assert content(found, left_out=PLACES) == content(plain, left_out=PLACES)
    return found


def test_a_step_like_one_before_it_is_written_at_once(tmp_path: Path, at_once: list[int]) -> None:
    found = both(tmp_path, [(inputs(2, seed),) for seed in range(6)])
    assert at_once == [1, 2, 3, 4, 5]
    assert found.ledger.stored == found.ledger.captured == 6 * 6


def test_other_shapes_and_other_equal_tensors_are_other_steps(tmp_path: Path, at_once: list[int]) -> None:
    same = inputs(2, 0)
    kinds = [(inputs(2, 1),), (same, same), (inputs(3, 2),), (inputs(2, 3), inputs(2, 4))]
    both(tmp_path, [kinds[number % 4] for number in range(20)])
    assert len(at_once) > 8


def test_a_step_that_differs_in_rows_alone_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native()
    resized: list[int] = []
    plain = SegmentSink.write_resized

    def counting(sink: SegmentSink, step: AlikeStep, rows: bytes, summary: StepSummary) -> bool:
        written = plain(sink, step, rows, summary)
        if written:
            resized.append(step.step)
        return written

    monkeypatch.setattr(SegmentSink, "write_resized", counting)
    rows = [2, 5, 3, 3, 1, 0, 7, 5, 0, 4]
    found = both(tmp_path, [(inputs(count, seed),) for seed, count in enumerate(rows)])
    # A number of rows that came before is no other plan, and without rows other tensors are equal.
    assert resized == [1, 2, 4, 6, 9]
    for step, count in enumerate(rows):
        (name,) = (each["name"] for each in found.step(step).records if "first/inputs" in each["name"])
        assert torch.equal(found.step(step).tensor(name), inputs(count, step))


@pytest.mark.parametrize(
    "keys",
    [{"store_dtype": "int8"}, {"store_dtype": "bfloat16"}, {"log_post_fwd_inputs": True}],
    ids=["int8", "bfloat16", "inputs afterwards"],
)
def test_rows_that_differ_are_those_of_what_is_stored(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native()
    resized: list[bytes] = []
    plain = SegmentSink.write_resized

    def counting(sink: SegmentSink, step: AlikeStep, rows: bytes, summary: StepSummary) -> bool:
        resized.append(rows)
        return plain(sink, step, rows, summary)

    monkeypatch.setattr(SegmentSink, "write_resized", counting)
    both(tmp_path, [(inputs(count, seed),) for seed, count in enumerate([2, 5, 3, 1, 9])], **keys)
    assert len(resized) >= 3


def test_steps_of_other_rows_follow_those_that_the_sink_still_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native()
    monkeypatch.setattr("tlcore_backends.safetensors.segment_sink._MOST_REMEMBERED", 2)
    monkeypatch.setattr("tlcore_backends.safetensors.plans._MOST_RESIZED", 2)
    monkeypatch.setattr(repeating, "_MOST_PLANS", 2)
    same = inputs(3, 0)
    kinds = [(same, same), (inputs(4, 1), inputs(4, 2)), (inputs(2, 3),)]
    calls = [
        tuple(each[: 1 + number % 3] for each in kinds[number * 7 % 3]) if number % 4 else kinds[number % 3]
        for number in range(40)
    ]
    both(tmp_path, calls)


def test_what_the_sink_has_forgotten_comes_as_any_other(
    tmp_path: Path, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcore_backends.safetensors.segment_sink._MOST_REMEMBERED", 1)
    calls = [(inputs(2 + number // 3 % 2, number),) for number in range(18)]
    both(tmp_path, calls)
    assert at_once


def test_equal_tensors_in_ever_other_ways_are_hashed_once(
    tmp_path: Path, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    plain = repeating.Repeats.look

    def counting(self: repeating.Repeats, batch: Any, plan: Any) -> Any:
        looks.append(batch.step)
        return plain(self, batch, plan)

    same = inputs(2, 0)
    calls = [(same, same) if number % 2 else (same, inputs(2, 100 + number)) for number in range(30)]
    both(tmp_path, calls)
    monkeypatch.setattr(repeating.Repeats, "look", counting)
    monkeypatch.setattr(repeating, "_MOST_KINDS", 1)
    # Nothing is hashed but what is looked at.
    monkeypatch.setattr(processor, "hex_digests", lambda views: pytest.fail("hashed again"))
    at_once.clear()
    found = run(tmp_path / "ever other ways", calls)
    found.verify()
    assert looks == list(range(30)) and not at_once


def test_a_step_that_cannot_be_written_is_booked_and_the_next_one_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native()
    plain = SegmentSink.write_alike

    def failing(sink: SegmentSink, step: AlikeStep, summary: StepSummary) -> bool:
        if step.step == 3:
            raise BackendError("no room")
        return plain(sink, step, summary)

    monkeypatch.setattr(SegmentSink, "write_alike", failing)
    found = run(tmp_path, [(inputs(2, seed),) for seed in range(6)])
    assert list(found.steps) == [0, 1, 2, 4, 5]
    assert found.ledger.failed == 6 and found.ledger.stored == 5 * 6
    assert found.ledger.reasons == {"failed: BackendError": 6}


def test_a_small_queue_and_steps_in_parts_lose_nothing(tmp_path: Path, at_once: list[int]) -> None:
    calls = [(inputs(64, seed),) for seed in range(8)]
    found = both(tmp_path, calls, queue_bytes=4096, block_s=60)
    assert found.ledger.stored == found.ledger.captured == 8 * 6


def test_a_step_whose_end_never_comes_keeps_no_memory(tmp_path: Path) -> None:
    config = load_config({"output_dir": str(tmp_path), **KEYS})
    session = Session(config, new_run(config), inline=True)
    model = Model()
    session.attach(model)
    submit = session._pipeline.submit  # type: ignore[union-attr]
    lost = [3]

    def losing(item: Any) -> None:
        if not (isinstance(item, StepEnd) and item.step in lost):
            submit(item)

    session._pipeline.submit = losing  # type: ignore[method-assign,union-attr]
    for number in range(6):
        session.begin_step()
        with torch.no_grad():
            model(inputs(2, number))
        session.end_step()
        if number > 3:
            assert not any(step.waiting for step in session._processor._steps.values())  # type: ignore[union-attr]
    session.close()
    assert session.ledger.balanced and session.ledger.stored == 5 * 6 and session.ledger.failed == 6


def test_a_sink_that_does_so_in_no_capture_gets_records(
    tmp_path: Path, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegmentSink, "alike_in_capture", False)
    found = run(tmp_path, [(inputs(3, step),) for step in range(4)])
    assert not at_once and len(found.steps) == 4
    found.verify()
