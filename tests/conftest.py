"""Fixtures for several test modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import SERVERS, Server


@pytest.fixture(scope="session", params=sorted(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each object store in turn, started once for all tests."""
    with SERVERS[request.param](tmp_path_factory.mktemp(request.param)) as running:
        yield running
