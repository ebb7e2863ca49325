"""Data sets among processes and threads: whoever reads, each item comes once and is right."""

from __future__ import annotations

import itertools
import json
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

import tlcore
from tests.ranked import Model, json_rows
from tests.reader.dataset.served import NAMES, Served, seen
from tests.reader.dataset.test_orders import SMALL, places
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.errors import ReadError
from tlcore.reader.dataset.dataset import RowDataset

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcore.reader.dataset.order._SMALLEST_GROUP", 64)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> RowDataset:
    """Two runs of different backends, with requests of the same names."""
    directory = tmp_path_factory.mktemp("runs")
    first = Served(requests=15).run(directory / "pt", "pt").dataset(NAMES)
    return first + Served(requests=25, seed=1).run(directory / "segments", "safetensors").dataset(NAMES)


def expected(data: RowDataset) -> list[tuple[int, int]]:
    """What `told` finds of all items."""
    return sorted((int(item["request"]), int(item["positions"])) for item in data)


def told(data: RowDataset, batches: Any) -> list[tuple[int, int]]:
    """Request and position of every item of batches, each of which must hold what its name says.

    Requests of the second run have other numbers than their names.
    """
    found = []
    for batch in batches:
        for at in range(len(batch["positions"])):
            item = {name: values[at] for name, values in batch.items()}
            number = int(item["request"])
            name = int(data.requests[number].removeprefix("r").partition("-")[0])
            _, position = seen({**item, "request": torch.tensor(name)})
            found.append((number, position))
    return found


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_stay_read_every_epoch_right(both: RowDataset, method: str) -> None:
    shuffled = both.shuffled(3, buffer_bytes=SMALL)
    # Files are open, and a thread reads ahead, when the workers are made.
    for place in range(40):
        _ = shuffled[place]
    options: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 5}
    loader: Any = DataLoader(shuffled, batch_size=7, multiprocessing_context=method, **options)
    epochs = [told(both, loader) for _ in range(2)]
    assert sorted(epochs[0]) == expected(both) and epochs[0] == epochs[1]
    sampler: Any = DistributedSampler(both, num_replicas=2, rank=1, shuffle=True, drop_last=True)
    plain: Any = DataLoader(both, batch_size=9, sampler=sampler, multiprocessing_context=method, **options)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        found = told(both, plain)
        assert len(found) == len(both) // 2 and set(found) <= set(expected(both))


@pytest.mark.parametrize("world", [1, 4, 7, 1000])
def test_any_number_of_ranks_divides_the_items(both: RowDataset, world: int) -> None:
    ranks = range(world) if world < 100 else [0, 1, 2, 3, 500, 997, 998, 999]
    found = [list(both.loader(6, rank=rank, world_size=world, buffer_bytes=SMALL)) for rank in ranks]
    rows = list(itertools.chain.from_iterable(told(both, each) for each in found))
    assert len(set(rows)) == len(rows)
    sizes = [sum(len(batch["positions"]) for batch in each) for each in found]
    assert max(sizes) - min(sizes) <= 1
    if world < 100:
        assert sorted(rows) == expected(both)
    dropped = [both.loader(6, rank=rank, world_size=world, drop_last=True) for rank in ranks]
    assert {len(each) for each in dropped} == {len(both) // world // 6}
    if world > 100:
        assert list(dropped[0]) == [] and dropped[0].epoch == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (0, 2)])
@pytest.mark.parametrize("drop", [False, True])
def test_ranks_with_workers_go_on_wherever_they_were(
    both: RowDataset, before: int, after: int, drop: bool
) -> None:
    def loader(rank: int, workers: int) -> Any:
        shape = {"rank": rank, "world_size": 2, "drop_last": drop, "num_workers": workers}
        return both.loader(11, seed=9, buffer_bytes=SMALL, **shape)

    whole = [told(both, loader(rank, before)) for rank in range(2)]
    rows: list[tuple[int, int]] = []
    for rank in range(2):
        first = loader(rank, before)
        begun = list(itertools.islice(iter(first), 3))
        middle = loader(rank, after)
        middle.load_state_dict(json.loads(json.dumps(first.state_dict())))
        more = list(itertools.islice(iter(middle), 2))
        # What was prefetched and not handed out comes again.
        last = loader(rank, before)
        last.load_state_dict(middle.state_dict())
        found = told(both, [*begun, *more, *last])
        assert found == whole[rank] and last.epoch == 1
        rows += found
    assert len(set(rows)) == len(rows)
    if not drop:
        assert sorted(rows) == expected(both)


def test_the_end_of_an_epoch_is_a_state_too(both: RowDataset) -> None:
    loader = both.loader(50, buffer_bytes=SMALL)
    states = [loader.state_dict() for _ in loader]
    resumed = both.loader(50, buffer_bytes=SMALL)
    resumed.load_state_dict(states[-1])
    assert list(resumed) == [] and resumed.epoch == 1
    assert told(both, resumed) == told(both, loader)
    with pytest.raises(ValueError, match="epoch -1 must not be negative"):
        loader.set_epoch(-1)


@pytest.mark.parametrize(
    "change",
    [
        {"delivered": 10**9},
        {"delivered": -1},
        {"delivered": None},
        {"epoch": -1},
        {"epoch": "1"},
        {"seed": -1},
        {"streams": 0},
        {"streams": 10**9},
        {"streams": 2.5},
        {"window_bytes": 0},
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused_and_leaves_the_loader(both: RowDataset, change: dict[str, Any]) -> None:
    loader = both.loader(50, buffer_bytes=SMALL)
    before = loader.state_dict()
    (key,) = change
    with pytest.raises(ReadError, match=f"the state is damaged: its {key} is"):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before
    nothing: Any = []
    with pytest.raises(ReadError, match="list is no loader's state"):
        loader.load_state_dict(nothing)


def test_the_state_is_that_of_the_newest_iteration(both: RowDataset) -> None:
    loader = both.loader(20, buffer_bytes=SMALL)
    older = iter(loader)
    begun = [next(older) for _ in range(3)]
    newer = iter(loader)
    first = next(newer)
    assert sorted(told(both, [*begun, *older])) == expected(both)
    assert (loader.epoch, loader.state_dict()["delivered"]) == (0, 1)
    assert sorted(told(both, [first, *newer])) == expected(both) and loader.epoch == 1


def test_threads_that_come_together_open_the_run_and_read_right(both: RowDataset) -> None:
    whole = expected(both)
    for _ in range(5):
        arrived: RowDataset = pickle.loads(pickle.dumps(both))
        with ThreadPoolExecutor(8) as pool:
            items = list(pool.map(lambda place: arrived[place], range(len(arrived))))  # noqa: B023 - done here
        assert (
            sorted(told(both, [{name: each[None] for name, each in item.items()} for item in items])) == whole
        )


def test_a_run_that_grows_leaves_a_data_set_as_it_is(tmp_path: Path) -> None:
    served = Served(requests=30)
    half = len(served.steps) // 2
    steps = _growing(tmp_path, served)
    url = next(itertools.islice(steps, half - 1, None))
    run = tlcore.open_run(url)
    data = run.dataset(NAMES)
    first = sorted(map(seen, data))
    state = data.loader(8).state_dict()
    arrived: RowDataset = pickle.loads(pickle.dumps(data))
    assert all(steps)
    run.refresh()
    # Also where it is opened anew, with all that is there by then.
    for found in (data, arrived):
        assert sorted(map(seen, found)) == first
        assert sorted(places(found.loader(8, num_workers=2, buffer_bytes=SMALL))) == first
    grown = run.dataset(NAMES)
    assert len(grown) > len(data) and set(map(seen, grown)) >= set(first)
    with pytest.raises(ReadError, match="the state is of another loader"):
        grown.loader(8).load_state_dict(state)


def _growing(directory: Path, served: Served) -> Iterator[str]:
    """A run of segments, of a few steps each, that goes on; its URL each time that a step is there."""
    backend = {"name": "safetensors", "segment_bytes": 2000, "commit_s": 0.001}
    keys: dict[str, Any] = {"output_dir": str(directory), "log_step_ids": [], "backend": backend}
    config = load_config(module_call_match=".", **keys)
    session = Session(config, new_run(config))
    names = ["layers_0", "layers_1"]
    model = Model(names)
    session.attach(model)
    for step, rows in enumerate(served.steps):
        numbers = [
            [int(request[1:].partition("-")[0]), first + at, step]
            for request, count, first in rows
            for at in range(count)
        ]
        codes = torch.tensor(numbers, dtype=torch.float32).repeat(1, 2)
        session.begin_step()
        model({"layers_0": codes, "layers_1": -codes.view(-1, 2, 3)})
        session.end_step(rows=json_rows(rows), extra={"tokens": served.entries[step]})
        session.flush()
        yield session.url
    session.close()
    yield session.url


def test_files_that_changed_meanwhile_are_not_taken_for_others(tmp_path: Path) -> None:
    run = tlcore.open_run(list(_growing(tmp_path, Served(requests=30)))[-1])
    arrived: RowDataset = pickle.loads(pickle.dumps(run.dataset(NAMES)))
    for path in sorted((Path(run.url) / "segments").glob("*.json"))[:2]:
        # The list of indexes, and the first of them: what is left has other numbers.
        path.unlink()
    with pytest.raises(ReadError, match="the run has changed since the data set was made of it"):
        list(arrived)


def test_after_a_read_that_fails_none_writes_into_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Served().run(tmp_path, "safetensors").dataset(NAMES)
    kind = type(data._rows.parts[0].sources)
    read, began, calls = kind.read, threading.Event(), itertools.count()

    def slow_or_failing(self: Any, *given: Any) -> Any:
        if next(calls) == 0:
            assert began.wait(30)
            raise ReadError("damaged")
        began.set()
        time.sleep(0.2)
        return read(self, *given)

    monkeypatch.setattr(kind, "read", slow_or_failing)
    into = [np.full((len(data), 24), 9, np.uint8) for _ in NAMES]
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(ReadError, match="damaged"):
            data._rows.fill(np.arange(len(data)), into, pool)
        # Whoever had the memory uses it for something else.
        for memory in into:
            memory[:] = 7
    assert all((memory == 7).all() for memory in into)
