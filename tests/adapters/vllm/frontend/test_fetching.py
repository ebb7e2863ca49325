"""Fetching a request: flushes are shared, late ranks are named, and what is stored is joined."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tlcore.adapters.vllm.frontend import fetching
from tlcore.adapters.vllm.frontend.fetching import (
    Flush,
    Flusher,
    LargeError,
    LateError,
    LostError,
    NothingError,
    Room,
    joined_names,
    size_of,
    stored_request,
)
from tlcore.adapters.vllm.frontend.fetching_route import _number, _request_of, _takes_zstd
from tlcore.adapters.vllm.reports import VARIABLE
from tlcore.errors import CaptureError, ConfigError, MissingError


class _Workers:
    """Workers that have stored everything after so many questions."""

    def __init__(self, rounds: Sequence[int]) -> None:
        self._rounds = rounds
        self.asked: list[tuple[str, list[str]]] = []

    async def ask(self, method: str, ticket: str, requests: list[str]) -> list[dict[str, Any]]:
        self.asked.append((ticket, requests))
        await asyncio.sleep(0.01)
        times = sum(each == ticket for each, _ in self.asked)
        return [
            {"rank": rank, "state": "flushing", "done": times >= needed, "requests": {}}
            for rank, needed in enumerate(self._rounds)
        ]


def test_those_who_ask_together_share_a_flush() -> None:
    workers = _Workers([1, 2])

    async def ask_all() -> None:
        flusher = Flusher(workers.ask)
        await asyncio.gather(*(flusher.flush({f"r{each}"}, 30) for each in range(20)))

    asyncio.run(ask_all())
    tickets = list(dict.fromkeys(ticket for ticket, _ in workers.asked))
    assert len(tickets) <= 2 and len(workers.asked) <= 4
    assert {each for _, requests in workers.asked for each in requests} == {f"r{each}" for each in range(20)}


def test_who_asks_while_one_runs_waits_for_the_next() -> None:
    workers = _Workers([3])

    async def ask_two() -> None:
        flusher = Flusher(workers.ask)
        first = asyncio.create_task(flusher.flush({"a"}, 30))
        await asyncio.sleep(0.015)
        await asyncio.gather(first, flusher.flush({"b"}, 30))

    asyncio.run(ask_two())
    tickets = list(dict.fromkeys(ticket for ticket, _ in workers.asked))
    assert len(tickets) == 2 and [requests for _, requests in workers.asked] == [["a"]] * 3 + [["b"]] * 3


def test_a_late_rank_is_named() -> None:
    flusher = _Workers([1, 10**6, 1, 10**6])
    with pytest.raises(LateError, match=r"ranks \[1, 3\] have not stored the request within 2 s"):
        asyncio.run(Flusher(flusher.ask).flush({"a"}, 2))


def test_an_engine_that_is_stuck_keeps_nobody_who_asks_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_LONGEST_S", 1)
    stuck, workers = [True], _Workers([1])

    async def ask(method: str, ticket: str, requests: list[str]) -> list[dict[str, Any]]:
        if stuck:
            stuck.pop()
            await asyncio.sleep(600)
        return await workers.ask(method, ticket, requests)

    async def ask_two() -> Flush:
        flusher = Flusher(ask)
        with pytest.raises(LateError, match=r"the engine has not answered within 1 s"):
            await flusher.flush({"a"}, 30)
        return await flusher.flush({"b"}, 30)

    (answer,) = asyncio.run(ask_two()).answers
    assert answer["done"] and [requests for _, requests in workers.asked] == [["b"]]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_of_an_engine_that_does_not_answer_stopped_ranks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_LONGEST_S", 1)
    directory = tmp_path / "reports"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv(VARIABLE, str(directory))

    async def ask(*_: Any) -> list[dict[str, Any]]:
        await asyncio.sleep(600)
        return []

    def flush(within_s: float) -> str:
        with pytest.raises(LateError) as told:
            asyncio.run(Flusher(ask).flush({"a"}, within_s))
        return str(told.value)

    workers = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    try:
        for rank, worker in enumerate(workers):
            report = {"rank": rank, "parent": os.getpid()}
            (directory / f"{worker.pid}_{rank}.json").write_text(json.dumps(report))
        assert flush(0.1) == "the engine's ranks have not stored the request within 0.1 s"
        for worker in workers[1:]:
            worker.send_signal(signal.SIGSTOP)
            os.waitpid(worker.pid, os.WUNTRACED)
        told = "ranks [1, 2] have not stored the request within 0.1 s: their processes are stopped"
        assert flush(0.1) == told
        workers[2].send_signal(signal.SIGCONT)
        os.waitpid(workers[2].pid, os.WCONTINUED)
        assert flush(30) == "the engine, of which ranks [1] are stopped, has not answered within 1 s"
        # The engine of rank 0 is stopped, and not the worker.
        report = {"rank": 0, "parent": workers[1].pid}
        (directory / f"{workers[0].pid}_0.json").write_text(json.dumps(report))
        assert flush(0.1).startswith("ranks [0, 1] have not stored")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(60)


def test_a_lost_step_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(number: int) -> Any:
        raise MissingError("no such step")

    monkeypatch.setattr(fetching, "open_run", lambda *_, **__: SimpleNamespace(url="u", step=step))
    known = {"a": {"run_id": "r", "url": "u", "steps": [3]}}
    for told, kind, text in (
        ({}, LostError, "step 3 of the run could not be stored by every rank, and is lost$"),
        ({"problem": "full"}, LostError, "is lost: full"),
        (
            {"problem": "x", "waiting": "2 steps in the spill_dir"},
            LateError,
            "rank yet: 2 steps in the spill",
        ),
    ):
        answers = [{"rank": 0, "requests": known}, {"rank": 1, "requests": {}, **told}]
        with pytest.raises(kind, match=text):
            stored_request(Flush(answers), "a", str)


def test_those_who_share_a_flush_share_what_is_read_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_run(url: str, storage_options: Any) -> Any:
        opened.append(url)
        return SimpleNamespace(url=url, options=storage_options)

    monkeypatch.setattr(fetching, "open_run", open_run)
    first, second = Flush(), Flush()
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: first.run("a", str.upper), range(8)))
    assert all(each is runs[0] for each in runs) and vars(runs[0])["options"] == "A"
    assert first.run("b", str.upper) is not runs[0] and second.run("a", str.upper) is not runs[0]
    assert opened == ["a", "b", "a"]


def test_what_is_too_large_is_refused_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    request: Any = SimpleNamespace(
        names=["a/outputs_cpu", "b/outputs_cpu"],
        dtype_and_shape=lambda name, unshard: ("float32" if name[0] == "a" else "bfloat16", [3, 5]),
    )
    assert size_of(request) == 3 * 5 * (4 + 2)
    monkeypatch.setattr(fetching, "MOST_BYTES", 89)
    with pytest.raises(LargeError, match="tensors have 90 bytes, and 89 are fetched at most; choose fewer"):
        size_of(request)


def test_what_is_fetched_at_once_is_bounded() -> None:
    async def fetch_all() -> None:
        room, soon = Room(10), time.monotonic()
        first, _ = await room.take(6, soon), await room.take(0, soon)
        with pytest.raises(LateError, match="no room"):
            await room.take(5, soon)
        second = await room.take(4, soon)
        waiting = asyncio.create_task(room.take(10, time.monotonic() + 60))
        await asyncio.sleep(0)
        assert not waiting.done()
        del first, second
        assert await asyncio.wait_for(waiting, 60)

    asyncio.run(fetch_all())


def test_a_refusal_of_a_rank_is_told() -> None:
    async def refuse(*given: Any) -> list[dict[str, Any]]:
        return [{"rank": 1, "state": "refused", "problem": "broken", "done": False}]

    with pytest.raises(CaptureError, match="rank 1: broken"):
        asyncio.run(Flusher(refuse).flush({"a"}, 5))


def test_nothing_captured_is_no_request() -> None:
    with pytest.raises(NothingError):
        stored_request(Flush([{"rank": 0, "requests": {}}]), "a", lambda url: None)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["l/outputs_cpu", "l/a_0_cpu"], {"l/outputs": "l/outputs_cpu", "l/a_0": "l/a_0_cpu"}),
        (["l/outputs_cuda_0", "l/outputs_cuda_1"], {"l/outputs": "l/outputs_cuda_0"}),
        (["l/outputs_0_cpu_rank_1"], {"l/outputs_0": "l/outputs_0_cpu_rank_1"}),
        (["l/a_b_cpu", "l/a_b_cpu~2"], {"l/a_b_cpu": "l/a_b_cpu", "l/a_b_cpu~2": "l/a_b_cpu~2"}),
    ],
)
def test_tensors_go_by_their_names_without_devices(names: list[str], expected: dict[str, str]) -> None:
    request: Any = SimpleNamespace(names=names)
    assert joined_names(request) == expected


def test_choices_are_counted_through_prompts_and_samples() -> None:
    document = {"items": {"1": ["b", 2], "0": ["a", 1], "10": ["c", 1]}}
    assert [_request_of(document, each) for each in range(4)] == ["a", "0_b", "1_b", "c"]
    with pytest.raises(ConfigError, match=r"\$\.index: the answer has 4 choices"):
        _request_of(document, 4)


@pytest.mark.parametrize(
    "text", ["-1", "nan", "inf", "x", "1e9", "0.5", "", "1_0", " 1", "+1", "1e1", "\u0663", "1.0", "9" * 400]
)
def test_a_wrong_index_is_refused(text: str) -> None:
    request = SimpleNamespace(query_params={"index": text})
    with pytest.raises(ConfigError, match=r"\$\.index"):
        _number(request, "index", 0, 1 << 20)


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("zstd", True),
        ("gzip, zstd;q=0.5", True),
        ("zstd; q=0", False),
        ("zstd;q=0.0", False),
        ("zstd;q=0.001", True),
        ("ZSTD ; Q=1.000", True),
        ("zstd;q=-1", False),
        ("zstd;q=abc", False),
        ("zstd;q=", False),
        ("zstd;q=1.5", False),
        ("zstd;q=nan", False),
        ("zstd;q=1_0", False),
        ("x-zstd", False),
        ("gzip", False),
        ("", False),
    ],
)
def test_zstd_is_sent_to_those_who_take_it(accepted: str, takes: bool) -> None:
    assert _takes_zstd(accepted) == takes
