"""A stateful test over sinks and faults: whatever fails in whatever order, the ledger always adds up."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import tlcore
from tests.fuzz.settings import cases
from tests.sinks import MemorySink
from tlcore.errors import BackendError
from tlcore.ledger import LEDGER_COLUMNS
from tlcore.protocols import Sink, StepStored
from tlcore.record import Record, RunInfo, StepSummary
from tlcore.registry import resolve
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.sink import SafetensorsSink

pytestmark = pytest.mark.slow
FAULTS = (
    OSError(28, "No space left on device"),
    BackendError("the place is gone"),
    ValueError("a bug of the sink"),
)
MODULES = ("first", "second", "third")


class Faulty:
    """A sink that fails where it is told to, before or after the real one has done its work."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.plan: dict[str, tuple[Exception, bool]] = {}
        self.delay_s = 0.0
        self.committed: list[StepSummary] = []

    def _around(self, method: str, *arguments: Any) -> None:
        time.sleep(self.delay_s)
        fault = self.plan.get(method)
        if fault is not None and not fault[1]:
            raise fault[0]
        getattr(self.sink, method)(*arguments)
        if fault is not None:
            raise fault[0]

    def open(self, run: RunInfo) -> None:
        self._around("open", run)

    def write(self, batch: Sequence[Record]) -> None:
        self._around("write", batch)

    def commit_step(self, step: StepSummary) -> None:
        self._around("commit_step", step)
        self.committed.append(step)

    def close(self) -> None:
        self._around("close")


class FaultyLate(Faulty):
    """The same around a sink that accepts steps and stores them later."""

    layout = 2

    def __init__(self, sink: Any) -> None:
        super().__init__(sink)
        self.accepted: dict[int, StepSummary] = {}

    def tell_stored(self, stored: StepStored) -> None:
        def told(step: int, error: BaseException | None) -> None:
            summary = self.accepted.pop(step)
            if error is None:
                self.committed.append(summary)
            stored(step, error)

        self.sink.tell_stored(told)  # type: ignore[attr-defined]

    def commit_step(self, step: StepSummary) -> None:
        # It may be told as stored before it returns.
        self.accepted[step.step] = step
        self._around("commit_step", step)

    def flush(self) -> None:
        self.sink.flush()  # type: ignore[attr-defined]


class Part(nn.Module):
    """Raises when it is told to."""

    raises = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises:
            raise ArithmeticError("the model's own")
        return x + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in MODULES:
            self.add_module(name, Part())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in MODULES:
            x = self.get_submodule(name)(x)
        return x


class Ledger(RuleBasedStateMachine):
    """One capture after another of one model, with faults that come and go."""

    @initialize(
        kind=st.sampled_from(["memory", "pt", "shards", "segments"]),
        commit_s=st.sampled_from([0, 0.001, 100]),
        queue_bytes=st.sampled_from([64, 4096, 1 << 20]),
        on_full=st.sampled_from(["block", "drop"]),
        max_tensor_size=st.sampled_from([None, 3, 100]),
        max_run_bytes=st.sampled_from([None, 500, 100_000]),
        inline=st.booleans(),
        post_inputs=st.booleans(),
    )
    def begin(self, kind: str, commit_s: float, inline: bool, post_inputs: bool, **keys: Any) -> None:
        self.kind = kind
        self.directory = tempfile.TemporaryDirectory()
        made: dict[str, type[Sink]] = {"memory": MemorySink, "pt": PtSink, "shards": SafetensorsSink}
        if kind == "segments":
            # Of three steps, or of a part of a step.
            self.sink: Faulty = FaultyLate(SegmentSink(200, commit_s))
        else:
            self.sink = Faulty(made[kind]())
        self.model = Model()
        self.expected = 0
        self.steps = 0
        self.sides = 3 if post_inputs else 2
        self.capture = tlcore.capture(
            self.model,
            backend=self.sink,
            inline=inline,
            output_dir=self.directory.name,
            log_step_ids=[],
            # All but the model itself.
            module_call_match=".",
            log_post_fwd_inputs=post_inputs,
            block_s=0.01,
            **keys,
        )
        self.capture.__enter__()
        self.open = True

    @precondition(lambda self: self.open)
    @rule(size=st.integers(0, 40), calls=st.integers(1, 4))
    def run_the_model(self, size: int, calls: int) -> None:
        x = torch.arange(float(size))
        for _ in range(calls):
            assert torch.equal(self.model(x), x + len(MODULES))
        self.expected += calls * self.sides * len(MODULES)
        self.steps += calls

    @precondition(lambda self: self.open)
    @rule(place=st.integers(0, len(MODULES) - 1))
    def the_model_raises(self, place: int) -> None:
        part = self.model.get_submodule(MODULES[place])
        assert isinstance(part, Part)
        part.raises = True
        with contextlib.suppress(ArithmeticError):
            self.model(torch.ones(2))
            raise AssertionError("the model's exception did not come through")
        part.raises = False
        # The one that raises has inputs, and again after the call, but no result.
        self.expected += place * self.sides + self.sides - 1
        self.steps += 1

    @rule(
        method=st.sampled_from(["write", "commit_step", "close"]),
        fault=st.sampled_from(FAULTS),
        late=st.booleans(),
    )
    def break_the_sink(self, method: str, fault: Exception, late: bool) -> None:
        # A sink that has committed a step and then fails has the step, and the ledger cannot know.
        late &= method == "write"
        # Whoever never closes a sink of segments leaves its threads to store what they have.
        self.sink.plan[method] = (fault, late or (method == "close" and self.kind == "segments"))

    @rule()
    def mend_the_sink(self) -> None:
        self.sink.plan.clear()

    @rule(delay_s=st.sampled_from([0.0, 0.0, 0.002]))
    def slow_the_sink(self, delay_s: float) -> None:
        self.sink.delay_s = delay_s

    @precondition(lambda self: self.open)
    @rule()
    def flush(self) -> None:
        self.capture.session.flush()
        self.complete()

    @precondition(lambda self: self.open)
    @rule()
    def close(self) -> None:
        self.capture.__exit__(None, None, None)
        self.open = False
        self.complete()
        self.as_stored()

    def complete(self) -> None:
        """Everything that the model ran is in the ledger, and the steps say the same."""
        counts = self.capture.ledger
        assert counts.captured == self.expected, counts.to_json()
        columns = {
            name: sum(getattr(step.counts, name) for step in self.sink.committed) for name in LEDGER_COLUMNS
        }
        assert all(step.counts.balanced for step in self.sink.committed)
        assert columns["stored"] == counts.stored
        assert columns["captured"] <= counts.captured and len(self.sink.committed) <= self.steps

    def as_stored(self) -> None:
        """What a reader finds is what the ledger says."""
        counts = self.capture.ledger
        if self.kind == "memory":
            return
        # The runs of a sink that is an object are read by whoever registers its reader.
        sink = type(self.sink)
        source = resolve("pt" if self.kind == "pt" else "safetensors").open_source
        name = f"{sink.__module__}.{sink.__qualname__}"
        tlcore.register_backend(name, sink=sink, source=source)
        run = tlcore.open_run(self.capture.url)
        assert run.verify() == counts.stored
        assert run.steps == sorted(step.step for step in self.sink.committed), self.kind
        if run.state == "complete":
            assert run.ledger.to_json() == counts.to_json()

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "capture"):
            counts = self.capture.ledger
            assert counts.balanced and counts.captured <= self.expected
            reasons = sum(counts.reasons.values())
            assert reasons == counts.skipped + counts.dropped + counts.failed, counts.to_json()

    def teardown(self) -> None:
        if hasattr(self, "capture"):
            if self.open:
                self.close()
            self.directory.cleanup()


TestLedger = Ledger.TestCase
TestLedger.settings = cases(50, 1000)
