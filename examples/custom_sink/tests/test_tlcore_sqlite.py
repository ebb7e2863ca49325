"""The sqlite backend passes tlcore's own suite for backends."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import tlcore_sqlite

from tlcore.errors import BackendError
from tlcore.testing import BackendConformance, MemoryStore, make_run


class TestSqlite(BackendConformance):
    backend = tlcore_sqlite.BACKEND


class TestCompressed(TestSqlite):
    options: ClassVar = {"compress": True}


def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"memory-store:.* needs a local directory"):
        tlcore_sqlite.SqliteSink().open(make_run("memory-store://", store=MemoryStore()))
