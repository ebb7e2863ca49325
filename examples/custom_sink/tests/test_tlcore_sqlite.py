"""The sqlite backend passes tlcore's own suite for sinks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import tlcore_sqlite
import torch

from tlcore.errors import BackendError
from tlcore.protocols import Sink
from tlcore.testing import SinkConformance, Tensors, make_run


class TestSqliteSink(SinkConformance):
    def make_sink(self) -> Sink:
        return tlcore_sqlite.SqliteSink()

    def committed(self, url: str) -> Mapping[int, Tensors]:
        path = Path(url) / "rank_0.sqlite"
        found: dict[int, dict[str, torch.Tensor]] = {step: {} for step in tlcore_sqlite.steps(path)}
        for step, name, tensor in tlcore_sqlite.read(path):
            found[step][name] = tensor
        return found


class TestCompressed(TestSqliteSink):
    def make_sink(self) -> Sink:
        return tlcore_sqlite.SqliteSink(compress=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"rank_0\.sqlite"):
        tlcore_sqlite.SqliteSink().open(make_run(tmp_path / "file"))
    with pytest.raises(BackendError, match="local directories only"):
        tlcore_sqlite.SqliteSink().open(make_run("s3://bucket/run"))
