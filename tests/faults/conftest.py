"""One SeaweedFS for all fault tests, and a fresh proxy before it for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxy, proxy_to
from tests.servers import Server, seaweedfs


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with seaweedfs(tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture
def proxy(weed: Server) -> Iterator[Proxy]:
    with proxy_to(weed.port) as running:
        yield running
