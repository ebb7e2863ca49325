"""Runs with request rows or several ranks, captured from functions of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlcore
from tlcore.adapters.vllm.worker.rows import external_id
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run, new_run_id
from tlcore.engine.session import Session
from tlcore.reader import Run

Rows = Sequence[tuple[str, int, int]]


class Says(nn.Module):
    """Returns what it is given, as vLLM's layers do with ``tuples``: in a pair with None."""

    def __init__(self, pairs: bool = False) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, x: torch.Tensor) -> Any:
        return (x, None) if self.pairs else x


class Model(nn.Module):
    """Calls a module for each tensor, by the tensor's name."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Says(pairs=name.endswith("proj")))

    def forward(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.get_submodule(name)(tensor)


def json_rows(
    rows: Rows, cached: Mapping[str, int] | None = None, adapters: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The rows of a ``step.json`` from (request id, number of rows, first position)."""
    found: list[dict[str, Any]] = []
    first = 0
    for request, count, position in rows:
        external = external_id(request)
        row = {"request_id": request, "external_request_id": external, "first_row": first, "rows": count}
        found.append({**row, "first_position": position, "cached": (cached or {}).get(request, 0)})
        if adapters and request in adapters:
            found[-1]["adapter"] = adapters[request]
        first += count
    return found


def requests_run(
    path: Path,
    steps: Sequence[Rows],
    tensors: Callable[[int, list[dict[str, Any]]], Mapping[str, torch.Tensor]],
    cached: Mapping[str, int] | None = None,
    backend: str | Mapping[str, Any] = "pt",
    extra: Callable[[int], Mapping[str, Any]] | None = None,
    adapters: Mapping[str, str] | None = None,
    **keys: Any,
) -> Run:
    """A run with these rows in its steps; ``tensors`` gives a step's tensors from its number and rows.

    What is called ``logits`` has a row for each request's last token. ``extra`` gives more of a
    step's document, ``keys`` are of the configuration.
    """
    usual: dict[str, Any] = {
        "output_dir": str(path),
        "log_step_ids": [],
        "backend": backend,
        "module_call_match": ".",
    }
    config = load_config({**usual, **keys})
    session = Session(config, new_run(config))
    model: Model | None = None
    for number, rows in enumerate(steps):
        listed = json_rows(rows, cached, adapters)
        found = tensors(number, listed)
        if model is None:
            model = Model(list(found))
            session.attach(model)
        session.begin_step()
        model(found)
        lasts = [
            {**row, "first_row": i, "rows": 1, "first_position": row["first_position"] + row["rows"] - 1}
            for i, row in enumerate(listed)
        ]
        logits = {"calls": ["logits"], "sets": [{"kind": "sampled", "rows": lasts}]}
        more = {} if extra is None else extra(number)
        session.end_step(rows=listed, extra={"call_rows": [logits], **more})
    session.close()
    return tlcore.open_run(session.url)


def ranks_run(
    path: Path,
    tensors: Sequence[Mapping[str, torch.Tensor]],
    sharded: Mapping[str, Any],
    backend: str = "pt",
    **keys: Any,
) -> Run:
    """A run of one step in which each rank captures its own tensors; ``sharded`` is for ``step.json``."""
    config = load_config(output_dir=str(path), backend=backend, module_call_match=".", **keys)
    size, run_id = len(tensors), new_run_id()
    url = ""
    for rank, own in enumerate(tensors):
        run = new_run(config, rank, size, run_id)
        places = [_place(each, size) for each in range(size)]
        run.document["ranks"] = places
        session = Session(config, run)
        model = Model(list(own))
        session.attach(model)
        session.begin_step()
        model(own)
        sharding = {"tp_rank": rank, "tp_size": size, "tensors": dict(sharded)}
        session.end_step(extra={"sharding": sharding})
        session.close()
        url = session.url
    return tlcore.open_run(url)


def _place(rank: int, size: int) -> dict[str, int]:
    alone = {
        f"{group}_{what}": int(what == "size") for group in ("pcp", "pp", "dp") for what in ("rank", "size")
    }
    return {"rank": rank, "tp_rank": rank, "tp_size": size, **alone}
