"""How soon a client has the first byte of what was captured of its request, after the answer."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from tests.adapters.vllm.client import MODULES, complete, delivering, fetch
from tests.adapters.vllm.server import VllmServer, serving
from tlcore.adapters.vllm.frontend.endpoint import ROOT_VARIABLE

from .rows import Row, Scale, at_most

_CLIENTS, _TOKENS = 16, 8
_GOAL_S = 0.2


def table(scale: Scale) -> list[Row]:
    """One client alone, then as many at once as begin again and again."""
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        environment = {"VLLM_PLUGINS": "tlcore,tlcore.endpoint", ROOT_VARIABLE: str(directory / "dumps")}
        with serving(directory, delivering(directory / "dumps", MODULES), environment) as server:
            _one(server, 0)
            alone = [_one(server, 1 + number) for number in range(4 * scale.repeats)]
            with ThreadPoolExecutor(_CLIENTS) as pool:
                numbers = range(1000, 1000 + _CLIENTS * scale.repeats)
                together = list(pool.map(lambda number: _one(server, number), numbers))
    return [_row("a client alone", alone), _row(f"one of {_CLIENTS} clients", together)]


def _one(server: VllmServer, number: int) -> float:
    """The seconds of one client's fetch."""
    answer = complete(server, f"bench{number}", prompt=[9, 10 + number % 400], max_tokens=_TOKENS)
    found = fetch(server, f"cmpl-bench{number}.safetensors", answer.token)
    assert found.status == 200, found.body
    return found.first_byte_s


def _row(who: str, seconds: list[float]) -> Row:
    worst = sorted(seconds)[int(0.9 * len(seconds))]
    detail = f"median of {len(seconds)}; nine tenths within {worst * 1e3:.0f} ms"
    what = f"first byte of a fetched request after its answer, {who}"
    return Row(what, median(seconds), at_most(_GOAL_S), "s", detail)
