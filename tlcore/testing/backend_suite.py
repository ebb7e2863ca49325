"""The conformance suite for whole backends: what is written is read back through `tlcore.open_run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from .. import registry
from ..engine.capture import capture
from ..errors import ReadError
from ..protocols import Backend, Sink, Source, SupportsLateCommit
from ..reader import Run, list_runs, open_run
from ..record import Record, StepSummary
from .run_writer import RunWriter
from .samples import bytes_of, every_dtype, make_record, make_run, make_summary

Tensors = Mapping[str, torch.Tensor]
_UNDER_TEST = "backend-under-test"


class BackendConformance:
    """What every `Backend` with both sides must do. Subclass it as ``Test...`` and set ``backend``.

    ``backend`` is a `Backend`, or the name of one that is installed; ``options`` are those of its sink.
    """

    backend: ClassVar[Backend | str]
    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def _registered(self) -> Iterator[None]:
        """A backend that has no name gets one for the test."""
        given = self.backend
        if isinstance(given, str):
            yield
            return
        sides = {"sink": given.sink, "source": given.source, "location": given.location}
        registry.register_backend(_UNDER_TEST, **sides, options_schema=given.options_schema)  # type: ignore[arg-type]
        yield
        del registry._registered[_UNDER_TEST]

    def make_output_dir(self, tmp_path: Path) -> str:
        """Where runs are to lie: a directory that does not exist yet, or a URL."""
        return str(tmp_path / "runs")

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend if isinstance(self.backend, str) else _UNDER_TEST

    def write(self, tmp_path: Path, run_id: str = "run-1", rank: int = 0, world_size: int = 1) -> RunWriter:
        """A run of the backend that is open for writing."""
        found = registry.resolve(self.name)
        location = found.located(self.options, self.make_output_dir(tmp_path))
        run = make_run(f"{location.url}/{run_id}", rank, world_size, run_id)
        sink = found.factory(**self.options)
        return RunWriter(sink, backend=found.written_as(self.options), run=run, location=location)

    def read(self, writer: RunWriter, tmp_path: Path) -> Run:
        """The run that a writer writes, opened as a user would."""
        location = registry.resolve(self.name).located(self.options, self.make_output_dir(tmp_path))
        return open_run(writer.run.url, location.storage_options)

    def test_both_sides_have_their_methods(self, tmp_path: Path) -> None:
        """``isinstance`` with the protocols checks that they are there."""
        writer = self.write(tmp_path)
        assert isinstance(writer.sink, Sink)
        writer.close()
        assert isinstance(self.read(writer, tmp_path).stored.source, Source)

    def test_every_dtype_and_shape_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        """Scalars and tensors without elements too; whole, in ranges, and verified."""
        tensors = dict(every_dtype())
        tensors["scalar"] = torch.tensor(-1.5, dtype=torch.bfloat16)
        tensors["empty"] = torch.empty((2, 0, 3), dtype=torch.float16)
        tensors["empty_complex"] = torch.empty((0,), dtype=torch.complex128)
        tensors["large"] = torch.arange(600_000, dtype=torch.float32).view(2, 3, -1)
        named = {f"step_0/m/{key}_cpu": tensor for key, tensor in tensors.items()}
        run = self._stored(tmp_path, [[make_record(name, tensor) for name, tensor in named.items()]])
        _assert_holds(run, {0: named})
        stream = run.step(0).payload("step_0/m/large_cpu")
        assert stream.read(1000, 1100).tolist() == list(range(1000, 1100))
        assert stream.read(599_999, 600_000).tolist() == [599_999]
        stream.close()

    def test_memory_is_free_once_write_returns(self, tmp_path: Path) -> None:
        """The pipeline uses a record's bytes again."""
        writer = self.write(tmp_path)
        records = [make_record(f"step_0/m/{i}_cpu", torch.full((5,), float(i))) for i in range(3)]
        for record in records:
            writer.write([record])
            record.data[:] = bytes(record.nbytes)
        self._commit(writer, make_summary(0, records))
        writer.close()
        expected = {f"step_0/m/{i}_cpu": torch.full((5,), float(i)) for i in range(3)}
        _assert_holds(self.read(writer, tmp_path), {0: expected})

    def test_an_alias_is_found_under_its_own_name(self, tmp_path: Path) -> None:
        """In the same batch, in a later one; one whose original was not stored stands for itself."""
        first = make_record("step_0/a/outputs_cpu", torch.arange(4.0))
        alias = [
            make_record(f"step_0/{m}/inputs_0_cpu", torch.arange(4.0), alias_of=first.name) for m in "bc"
        ]
        lonely = make_record("step_0/d/inputs_0_cpu", torch.ones(2), alias_of="step_0/lost/outputs_cpu")
        run = self._stored(tmp_path, [[first, alias[0]], [alias[1], lonely]])
        same = dict.fromkeys([first.name, alias[0].name, alias[1].name], torch.arange(4.0))
        _assert_holds(run, {0: {**same, lonely.name: torch.ones(2)}})
        assert [each.get("alias_of") for each in run.step(0).records] == [None, first.name, first.name, None]

    def test_a_step_tells_all_that_was_committed(self, tmp_path: Path) -> None:
        """Calls, rows, structures, further keys, hashes and origins."""
        record = make_record("step_3/a/outputs_cpu", torch.ones(2))
        writer = self.write(tmp_path)
        writer.write([record])
        summary = make_summary(3, [record], rows=[{"request_id": "r", "first_row": 0, "rows": 2}], note=1)
        self._commit(writer, summary)
        writer.close()
        step = self.read(writer, tmp_path).step(3)
        assert (step.calls, step.rows) == (["a"], summary.rows)
        assert (step.documents[0]["note"], step.documents[0]["started"]) == (1, summary.started)
        assert step.structures(0) == dict(summary.structures)
        stored = step.records[0]
        assert {key: stored[key] for key in record.describe()} == record.describe()

    def test_ranks_write_one_run(self, tmp_path: Path) -> None:
        """A step counts once every rank has committed it."""
        writers = [self.write(tmp_path, rank=rank, world_size=2) for rank in (0, 1)]
        label = ["", "_rank_1"]
        for number in (0, 1):
            for rank, writer in enumerate(writers):
                if (number, rank) != (1, 1):
                    tensor = torch.full((2,), float(rank))
                    record = make_record(f"step_{number}/a/outputs_cpu{label[rank]}", tensor, rank)
                    writer.write([record])
                    self._commit(writer, make_summary(number, [record], rank))
        for writer in writers:
            writer.close()
        run = self.read(writers[0], tmp_path)
        assert (run.state, run.steps, run.incomplete_steps) == ("complete", [0], [1])
        found = run.step(0)
        assert found["step_0/a/outputs_cpu"].tolist() == [0, 0]
        assert found["step_0/a/outputs_cpu_rank_1"].tolist() == [1, 1]
        assert found.calls == ["a"]
        assert run.ledger.stored == 3
        assert run.verify() == 3

    def test_a_crash_in_the_middle_leaves_what_was_committed(self, tmp_path: Path) -> None:
        """The process ends between `write` and `commit_step`: nothing is closed."""
        writer = self.write(tmp_path)
        kept = make_record("step_0/a/outputs_cpu", torch.ones(2))
        writer.write([kept])
        writer.commit_step(make_summary(0, [kept]))
        if isinstance(writer.sink, SupportsLateCommit):
            writer.sink.flush()
        lost = make_record("step_1/a/outputs_cpu", torch.zeros(2))
        writer.write([lost])
        run = self.read(writer, tmp_path)
        assert (run.state, run.steps) == ("incomplete", [0])
        assert torch.equal(run.tensor(kept.name), torch.ones(2))
        assert (run.ledger.captured, run.ledger.stored) == (1, 1)
        assert run.verify() == 1
        for number in run.incomplete_steps:
            # What is left of a step is whole or not there.
            for name, tensor in run.step(number).items():
                assert (name, bytes_of(tensor)) == (lost.name, bytes_of(torch.zeros(2)))
        writer.close()

    def test_an_abandoned_step_is_not_committed(self, tmp_path: Path) -> None:
        """The next step is whole and has nothing of the one before; one without tensors is a step, too."""
        writer = self.write(tmp_path)
        writer.write([make_record("step_0/a/outputs_cpu", torch.zeros(2))])
        kept = make_record("step_1/a/outputs_cpu", torch.ones(2))
        writer.write([kept])
        self._commit(writer, make_summary(1, [kept]))
        self._commit(writer, make_summary(2, []))
        writer.close()
        run = self.read(writer, tmp_path)
        assert run.steps == [1, 2]
        _assert_holds(run, {1: {kept.name: torch.ones(2)}, 2: {}})

    def test_a_run_without_steps_can_be_closed(self, tmp_path: Path) -> None:
        """A server that never got a request."""
        writer = self.write(tmp_path)
        writer.close()
        run = self.read(writer, tmp_path)
        assert (run.state, run.steps, run.incomplete_steps) == ("complete", [], [])
        assert run.verify() == 0

    def test_what_is_not_there_is_a_read_error(self, tmp_path: Path) -> None:
        """A step, a tensor, a structure: each with a message, none with a traceback of the format's own."""
        run = self._stored(tmp_path, [[make_record("step_0/a/outputs_cpu", torch.ones(2))]])
        for read in (
            lambda: run.step(7),
            lambda: run.tensor("step_0/b/outputs_cpu"),
            lambda: run.step(0).call("a").structure("inputs"),
            lambda: run.json("step_0/b/outputs.json"),
        ):
            with pytest.raises(ReadError):
                read()

    def test_a_captured_model_balances_and_is_listed(self, tmp_path: Path) -> None:
        """Through the whole engine, with a backend chosen by name and options."""
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        output_dir = self.make_output_dir(tmp_path)
        chosen = {"name": self.name, **self.options}
        with capture(model, output_dir=output_dir, log_step_ids=[], backend=chosen) as captured:
            expected = [model(torch.full((2, 4), float(step))) for step in range(3)]
        assert captured.ledger.balanced
        assert captured.ledger.captured == captured.ledger.stored > 0
        location = registry.resolve(self.name).located(self.options, output_dir)
        run = open_run(captured.url, location.storage_options)
        assert (run.state, run.steps, run.ledger) == ("complete", [0, 1, 2], captured.ledger)
        for step, tensor in enumerate(expected):
            assert torch.equal(run.tensor(f"step_{step}/1/outputs_cpu"), tensor)
        assert run.verify() == captured.ledger.stored
        listed = {each.run_id: each for each in list_runs(location.url, location.storage_options)}
        assert (listed[run.id].state, listed[run.id].steps, listed[run.id].problem) == ("complete", 3, None)

    def _commit(self, writer: RunWriter, summary: StepSummary) -> None:
        """Commit a step and book it as the engine does."""
        writer.commit_step(summary)
        writer.run.ledger.add(summary.counts)

    def _stored(self, tmp_path: Path, batches: Sequence[Sequence[Record]]) -> Run:
        """A run of one step of ``batches``."""
        writer = self.write(tmp_path)
        for batch in batches:
            writer.write(batch)
        self._commit(writer, make_summary(0, [record for batch in batches for record in batch]))
        writer.close()
        return self.read(writer, tmp_path)


def _assert_holds(run: Run, expected: Mapping[int, Tensors]) -> None:
    """The run is whole, sound, and has just these tensors."""
    assert run.state == "complete"
    assert {number: set(run.step(number)) for number in run.steps} == {
        number: set(tensors) for number, tensors in expected.items()
    }
    for number, tensors in expected.items():
        step = run.step(number)
        for name, tensor in tensors.items():
            found = step[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            assert bytes_of(found) == bytes_of(tensor), name
    count = sum(map(len, expected.values()))
    assert run.verify() == count
    assert (run.ledger.captured, run.ledger.stored) == (count, count)
