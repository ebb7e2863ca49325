"""Fixtures for several test modules."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from tests.amx import with_amx
from tests.amx.sitecustomize import permit_amx
from tests.deep import DEEP
from tests.servers import SERVERS, Server
from tests.waiting import tails, time_limit
from tlcore import registry

# For engines in this process, and in every one that it starts.
permit_amx()
os.environ["PYTHONPATH"] = with_amx(os.environ.get("PYTHONPATH"))

# The tests that need a device run where there is little beside torch.
with suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # A busy machine is not a failure: what a test must not exceed, it says itself.
    settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what this run or this machine is not meant for."""
    for item in items:
        # Each worker would know such a test by another name, and none would run.
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid} has an address in its name: give its parameters ids")
        if item.get_closest_marker("deep") and not DEEP:
            item.add_marker(pytest.mark.skip(reason="runs in `make test-deep`"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # Workers take whole files in this order: the long ones first, so that none is left alone with one.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, "vllm" not in item.path.parts))


def _seconds(item: pytest.Item) -> float:
    """How long one phase of a test may take at the very most, on the slowest machine."""
    if item.get_closest_marker("deep") or DEEP:
        return 7200
    return 1200 if item.get_closest_marker("slow") else 300


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """No fixture waits for ever."""
    with time_limit(_seconds(item), f"the setup of {item.name}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """No test waits for ever."""
    with time_limit(_seconds(item), item.name):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """No fixture waits for ever to end."""
    with time_limit(_seconds(item), f"the end of {item.name}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed shows what the servers said that it leaned on."""
    report = yield
    if report.failed:
        report.sections += tails()
    return report


@pytest.fixture(autouse=True)
def registrations() -> Iterator[None]:
    """What a test registers ends with it: other tests ask which backends there are."""
    tables: list[dict[str, Any]] = [registry._registered, registry._stores, registry._followed]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture
def no_aws_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own options alone say how S3 is reached."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session", params=sorted(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each object store in turn, started once for all tests."""
    with SERVERS[request.param](tmp_path_factory.mktemp(request.param)) as running:
        yield running
