"""In which order items come: shuffled the same each time, once each, by any number of processes, resumed."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import tlcore
from tests.reader.dataset.served import NAMES, Served, seen
from tests.servers import Server, moto
from tlcore.config.configuration import load_config
from tlcore.errors import ReadError
from tlcore.reader import Run
from tlcore.reader.dataset.dataset import RowDataset
from tlcore.reader.dataset.order import Order, Plan
from tlcore.runs.convert import convert

pytestmark = pytest.mark.slow

# Several windows of several groups, whatever the bytes.
SMALL = 600


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(requests=40)


@pytest.fixture(scope="module", params=["pt", "safetensors"])
def run(request: pytest.FixtureRequest, served: Served, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return served.run(tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcore.reader.dataset.order._SMALLEST_GROUP", 64)


def places(batches: Iterable[dict[str, torch.Tensor]]) -> list[tuple[int, int]]:
    """Request and position of every item of batches, each of which must hold what it says."""
    found = []
    for batch in batches:
        for at in range(len(batch["positions"])):
            found.append(seen({name: values[at] for name, values in batch.items()}))
    return found


def test_a_shuffled_set_has_each_item_once_and_the_same_order_each_time(run: Run) -> None:
    data = run.dataset(NAMES)
    plain = [seen(item) for item in data]
    shuffled = data.shuffled(7, buffer_bytes=SMALL)
    order = [seen(shuffled[place]) for place in range(len(shuffled))]
    assert sorted(order) == sorted(plain) and order != plain and len(set(order)) == len(order)
    assert order == [seen(item) for item in run.dataset(NAMES).shuffled(7, buffer_bytes=SMALL)]
    assert order != [seen(item) for item in data.shuffled(8, buffer_bytes=SMALL)]
    assert order != [seen(item) for item in data.shuffled(7, epoch=1, buffer_bytes=SMALL)]
    assert seen(shuffled[-1]) == order[-1]
    # Also what is read behind another window comes from where it lies.
    assert [seen(shuffled[place]) for place in (200, 3, 100)] == [order[place] for place in (200, 3, 100)]


def test_the_order_is_of_everything_and_stays_what_it_was() -> None:
    order = Order(100_000, 1000, None, Plan(3, 0, 1 << 22))
    windows = [order.items(window) for window in range(order.windows)]
    assert order.windows == 24 and sorted(torch.cat([torch.tensor(each) for each in windows]).tolist()) == [
        *range(100_000)
    ]
    # Each window has items from all over the set, in no order.
    for each in windows[:-1]:
        spread = torch.tensor(each).float()
        assert spread.min() < 20_000 and spread.max() > 80_000
        assert abs(torch.corrcoef(torch.stack([spread, torch.arange(len(spread)).float()]))[0, 1]) < 0.1
    assert windows[0][:5].tolist() == [16723, 58845, 64071, 18998, 49444]


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_own_loader_sees_each_item_once(run: Run, workers: int) -> None:
    data = run.dataset(NAMES)
    each: Sequence[Dataset[Any]] = [data, data.shuffled(1, buffer_bytes=SMALL)]
    for found in each:
        loader: Any = DataLoader(found, batch_size=7, num_workers=workers)
        assert sorted(places(loader)) == sorted(seen(item) for item in data)


def test_torchs_distributed_sampler_divides_the_items(run: Run) -> None:
    data = run.dataset(NAMES).shuffled(1, buffer_bytes=SMALL)
    found = []
    for rank in range(3):
        sampler: Any = DistributedSampler(data, num_replicas=3, rank=rank, shuffle=False)
        found.append(places(DataLoader(data, batch_size=5, sampler=sampler)))
    whole = [seen(item) for item in data]
    # It repeats the first ones so that every rank has as many.
    assert sorted(itertools.chain(*found)) == sorted(whole + whole[: -len(whole) % 3])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("workers", "world", "drop"), [(0, 1, False), (2, 1, False), (0, 3, False), (2, 2, True)]
)
def test_a_loader_gives_each_item_once_over_all_ranks(
    run: Run, shuffle: bool, workers: int, world: int, drop: bool
) -> None:
    data = run.dataset(NAMES)
    found, lengths = [], []
    for rank in range(world):
        options = {"rank": rank, "world_size": world, "drop_last": drop, "shuffle": shuffle}
        loader = data.loader(9, num_workers=workers, buffer_bytes=SMALL * 2, **options)
        batches = list(loader)
        assert len(batches) == len(loader)
        found += places(batches)
        lengths.append([len(batch["positions"]) for batch in batches])
    assert len(set(found)) == len(found)
    if drop:
        assert lengths[0] == lengths[1] == [9] * (len(data) // 2 // 9)
    else:
        assert len(found) == len(data)
    if not shuffle and not workers and not drop:
        assert found == [seen(item) for item in data]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_loader_goes_on_where_another_was_left(run: Run, workers: int, stop: int) -> None:
    data = run.dataset(NAMES)

    def loader(count: int) -> Any:
        return data.loader(8, seed=5, num_workers=count, buffer_bytes=SMALL * 2)

    whole = loader(workers)
    first, second = places(whole), places(whole)
    assert sorted(first) == sorted(second) and first != second and whole.epoch == 2
    left = loader(workers)
    left.set_epoch(1)
    begun = []
    for number, batch in enumerate(left):
        if number == stop:
            break
        begun.append(batch)
        state = left.state_dict()
    if not stop:
        state = {**left.state_dict(), "delivered": 0}
    # In another process, from a file, with another number of workers.
    resumed = loader(2 - workers)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert places(begun) + places(resumed) == second
    assert sorted(places(resumed)) == sorted(first) and resumed.epoch == 3


def test_a_state_of_other_data_or_batches_is_refused(run: Run) -> None:
    data = run.dataset(NAMES)
    state = data.loader(8).state_dict()
    for other, message in (
        (data.loader(9), "its batch_size is 8, not 9"),
        (data.loader(8, rank=1, world_size=2), "its rank is 0, not 1"),
        (run.dataset(NAMES[0]).loader(8), "its data is"),
        (run.dataset(NAMES, rows="prompt").loader(8), "its items is"),
    ):
        with pytest.raises(ReadError, match=message):
            other.load_state_dict(state)
    with pytest.raises(ReadError, match="version 2 of a loader's state is not known"):
        data.loader(8).load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        data.loader(8, rank=2, world_size=2)


def test_whole_requests_come_as_lists_or_collated(run: Run, served: Served) -> None:
    data = run.dataset(NAMES, per="request")
    lengths = sorted(map(len, served.ids.values()))
    batches = list(data.loader(4, buffer_bytes=SMALL, num_workers=2))
    assert sorted(len(item["positions"]) for batch in batches for item in batch) == lengths
    assert all(item[NAMES[0]].shape == (len(item["positions"]), 6) for batch in batches for item in batch)
    collated = list(data.loader(4, buffer_bytes=SMALL, collate=_lengths))
    assert sorted(itertools.chain(*collated)) == lengths
    pieces = list(run.dataset(NAMES, context=3).loader(4, buffer_bytes=SMALL))
    assert all(batch[NAMES[1]].shape[1:] == (3, 2, 3) for batch in pieces)
    assert all(batch["request"].shape == (len(batch["positions"]),) for batch in pieces)


def _lengths(items: Sequence[dict[str, torch.Tensor]]) -> list[int]:
    return [len(item["positions"]) for item in items]


@pytest.mark.parametrize("per", ["token", "request"])
def test_several_runs_are_one_set(per: Any, tmp_path: Path) -> None:
    both = [Served(8, seed=seed) for seed in (1, 2)]
    runs = [each.run(tmp_path, backend) for each, backend in zip(both, ("pt", "safetensors"), strict=True)]
    one, two = (run.dataset(NAMES, per=per) for run in runs)
    data = one + two
    assert len(data) == len(one) + len(two) and data.requests == one.requests + two.requests
    for place in range(len(data)):
        own = one[place] if place < len(one) else two[place - len(one)]
        offset = 0 if place < len(one) else len(one.requests)
        item = data[place]
        assert int(item["request"]) == int(own["request"]) + offset
        assert all(torch.equal(item[name], own[name]) for name in own if name != "request")
    order = [item for batch in data.loader(3, buffer_bytes=SMALL) for item in _items(batch)]
    assert len(order) == len(data)
    # Requests of both go by the same ids.
    late = [run.dataset(NAMES, rows={"from": 8}, per=per) for run in runs]
    assert late[0].left_out.keys() & late[1].left_out.keys()
    assert len((late[0] + late[1]).left_out) == len(late[0].left_out) + len(late[1].left_out)
    with pytest.raises(ReadError, match="cannot be joined: their names differ"):
        one + runs[1].dataset(NAMES[0], per=per)
    with pytest.raises(ReadError, match="TensorDataset is no data set of a run"):
        one.__add__(TensorDataset(torch.ones(1)))


def _items(batch: Any) -> list[Any]:
    return batch if isinstance(batch, list) else batch["positions"].tolist()


def test_an_error_of_a_worker_reaches_the_reader(served: Served, tmp_path: Path) -> None:
    run = served.run(tmp_path, "pt")
    data: RowDataset = run.dataset(NAMES)
    broken = next(tmp_path.rglob("layers_0/outputs_cpu.pt"))
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(ReadError, match="layers_0"):
        list(data.loader(8, num_workers=1))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_run_in_object_storage_is_read_by_workers(s3: Server, backend: str, tmp_path: Path) -> None:
    # The server answers slowly, and each worker asks for every request.
    local = Served(requests=12).run(tmp_path, backend)
    name = {"name": "fsspec", "format": backend, "storage_options": s3.options}
    url = convert(local, load_config(output_dir=f"{s3.url}/sets", backend=name))
    data = tlcore.open_run(url, s3.options).dataset(NAMES)
    whole = sorted(seen(item) for item in local.dataset(NAMES))
    for workers in (0, 2):
        assert sorted(places(data.loader(16, num_workers=workers, buffer_bytes=SMALL))) == whole
    forked: Any = DataLoader(data, batch_size=16, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ReadError, match='give the DataLoader multiprocessing_context="spawn"'):
        next(iter(forked))
    spawned: Any = DataLoader(data, batch_size=16, num_workers=1, multiprocessing_context="spawn")
    assert sorted(places(spawned)) == whole


def test_memory_filesystems_are_read_too(served: Served, tmp_path: Path) -> None:
    local = served.run(tmp_path, "safetensors")
    url = convert(local, load_config(output_dir="memory://sets", backend="safetensors"))
    data = tlcore.open_run(url).dataset(NAMES)
    assert sorted(places(data.loader(16, buffer_bytes=SMALL))) == sorted(map(seen, local.dataset(NAMES)))
    fsspec.filesystem("memory").rm("/sets", recursive=True)
