"""Where OpenMP has bound the model's thread to one processor, capture's threads are not bound with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tlcore
from tlcore.engine.pipeline import cpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and sets affinities")

_BINDING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """This thread is bound to one processor, and another thread is where all of the process was: there."""
    for name in _BINDING:
        monkeypatch.delenv(name, raising=False)
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("needs two processors")
    end = threading.Event()
    elsewhere = threading.Thread(target=end.wait)
    elsewhere.start()
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        yield everywhere
    finally:
        os.sched_setaffinity(0, everywhere)
        end.set()
        elsewhere.join(10)


def _affinities_of_capture(directory: Path) -> list[set[int]]:
    before = set(os.listdir("/proc/self/task"))
    model = nn.Linear(2, 2)
    with tlcore.capture(model, output_dir=directory, backend="safetensors", log_step_ids=[]) as captured:
        model(torch.ones(1, 2))
        captured.session.flush()
        made = set(os.listdir("/proc/self/task")) - before
        return [os.sched_getaffinity(int(thread)) for thread in made]


@pytest.mark.parametrize("name", _BINDING)
def test_capture_is_not_bound_with_the_model(
    name: str, bound: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    found = _affinities_of_capture(tmp_path)
    assert found and all(each == bound for each in found)
    assert os.sched_getaffinity(0) == {min(bound)}


def test_an_affinity_that_is_not_of_openmp_is_kept(bound: set[int], tmp_path: Path) -> None:
    found = _affinities_of_capture(tmp_path)
    assert found and all(each == {min(bound)} for each in found)


def test_a_child_may_use_what_its_parent_may(bound: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(os, "listdir", lambda _: [])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        os.sched_setaffinity(parent.pid, bound)
        monkeypatch.setattr(cpus, "parent_process", lambda: SimpleNamespace(pid=parent.pid))
        with cpus.unbound():
            assert os.sched_getaffinity(0) == bound
        parent.communicate(b"\n", timeout=30)
    assert os.sched_getaffinity(0) == {min(bound)}
    with cpus.unbound():
        assert os.sched_getaffinity(0) == {min(bound)}, "a parent that has ended tells nothing"
