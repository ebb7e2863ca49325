"""The conformance suite for sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..protocols import Sink
from ..record import Record, RunInfo
from .samples import bytes_of, every_dtype, make_record, make_run, make_summary

Tensors = Mapping[str, torch.Tensor]


class SinkConformance:
    """What every `Sink` must do. Subclass it as ``Test...``, override `make_sink` and `committed`."""

    def make_sink(self) -> Sink:
        """A new sink, not yet opened."""
        raise NotImplementedError

    def make_url(self, tmp_path: Path) -> str:
        """Where the run is to lie: a directory that does not exist yet."""
        return str(tmp_path / "run")

    def make_run(self, url: str) -> RunInfo:
        """The run at ``url``, its store opened."""
        return make_run(url)

    def committed(self, url: str) -> Mapping[int, Tensors]:
        """The tensors of every committed step of the run at ``url``, by step and logical name."""
        raise NotImplementedError

    def test_it_has_the_methods_of_a_sink(self) -> None:
        """``isinstance`` with the protocol checks that they are there."""
        assert isinstance(self.make_sink(), Sink)

    def test_every_dtype_and_shape_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        """Scalars and tensors without elements too."""
        tensors = dict(every_dtype())
        tensors["scalar"] = torch.tensor(-1.5, dtype=torch.bfloat16)
        tensors["empty"] = torch.empty((2, 0, 3), dtype=torch.float16)
        tensors["empty_complex"] = torch.empty((0,), dtype=torch.complex128)
        tensors["large"] = torch.arange(600_000, dtype=torch.float32).view(2, 3, -1)
        named = {f"step_0/m/{key}_cpu": tensor for key, tensor in tensors.items()}
        url = self._store(tmp_path, [[make_record(name, tensor) for name, tensor in named.items()]])
        _assert_same(self.committed(url), {0: named})

    def test_memory_is_free_once_write_returns(self, tmp_path: Path) -> None:
        """The pipeline uses a record's bytes again."""
        url, sink = self.make_url(tmp_path), self.make_sink()
        sink.open(self.make_run(url))
        records = [make_record(f"step_0/m/{i}_cpu", torch.full((5,), float(i))) for i in range(3)]
        for record in records:
            sink.write([record])
            record.data[:] = bytes(record.nbytes)
        sink.commit_step(make_summary(0, records))
        sink.close()
        expected = {f"step_0/m/{i}_cpu": torch.full((5,), float(i)) for i in range(3)}
        _assert_same(self.committed(url), {0: expected})

    def test_an_alias_is_found_under_its_own_name(self, tmp_path: Path) -> None:
        """In the same batch, in a later one, and of another alias's original."""
        first = make_record("step_0/a/outputs_cpu", torch.arange(4.0))
        alias = [
            make_record(f"step_0/{m}/inputs_0_cpu", first.tensor().clone(), alias_of=first.name) for m in "bc"
        ]
        url = self._store(tmp_path, [[first, alias[0]], [alias[1]]])
        names = [first.name, alias[0].name, alias[1].name]
        _assert_same(self.committed(url), {0: dict.fromkeys(names, torch.arange(4.0))})

    def test_an_alias_without_its_original_stands_for_itself(self, tmp_path: Path) -> None:
        """The original's step part may have been dropped."""
        lonely = make_record("step_0/a/outputs_cpu", torch.ones(2), alias_of="step_0/lost/outputs_cpu")
        url = self._store(tmp_path, [[lonely]])
        _assert_same(self.committed(url), {0: {lonely.name: torch.ones(2)}})

    def test_an_abandoned_step_is_not_committed(self, tmp_path: Path) -> None:
        """The next step is whole, and has nothing of the one before."""
        url, sink = self.make_url(tmp_path), self.make_sink()
        sink.open(self.make_run(url))
        sink.write([make_record("step_0/a/outputs_cpu", torch.zeros(2))])
        kept = make_record("step_1/a/outputs_cpu", torch.ones(2))
        sink.write([kept])
        sink.commit_step(make_summary(1, [kept]))
        sink.close()
        _assert_same(self.committed(url), {1: {kept.name: torch.ones(2)}})

    def test_steps_without_tensors_are_committed(self, tmp_path: Path) -> None:
        """A step in which every tensor was skipped is still a step."""
        assert dict(self.committed(self._store(tmp_path, []))) == {0: {}}

    def test_a_run_without_steps_can_be_closed(self, tmp_path: Path) -> None:
        """A server that never got a request."""
        url, sink = self.make_url(tmp_path), self.make_sink()
        sink.open(self.make_run(url))
        sink.close()
        assert dict(self.committed(url)) == {}

    def _store(self, tmp_path: Path, batches: Sequence[Sequence[Record]]) -> str:
        """Store one step of ``batches``; returns the run's URL."""
        url, sink = self.make_url(tmp_path), self.make_sink()
        sink.open(self.make_run(url))
        for batch in batches:
            sink.write(batch)
        sink.commit_step(make_summary(0, [record for batch in batches for record in batch]))
        sink.close()
        return url


def _assert_same(found: Mapping[int, Tensors], expected: Mapping[int, Tensors]) -> None:
    assert {step: set(tensors) for step, tensors in found.items()} == {
        step: set(tensors) for step, tensors in expected.items()
    }
    for step, tensors in expected.items():
        for name, tensor in tensors.items():
            other = found[step][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            assert bytes_of(other) == bytes_of(tensor), name
