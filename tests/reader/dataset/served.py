"""Runs as a busy server leaves them: requests that come and go, chunks, preemptions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.ranked import Rows, requests_run
from tlcore.reader import Run

WIDTH = 6


class Served:
    """What a server computed: ``steps`` are its batches, ``prompts`` and ``ids`` each request's."""

    def __init__(self, requests: int = 12, seed: int = 0, preempts: bool = True) -> None:
        self._random = random.Random(seed)
        self.steps: list[Rows] = []
        self.entries: list[list[dict[str, Any]]] = []
        self.prompts: dict[str, int] = {}
        self.ids: dict[str, list[int]] = {}
        self._preempts = preempts
        waiting = [f"r{number}-{number:08x}" for number in range(requests)]
        running: dict[str, int] = {}
        while waiting or running:
            if waiting and len(running) < 4:
                request = waiting.pop(0)
                self.prompts[request] = self._random.randint(1, 9)
                length = self.prompts[request] + self._random.randint(0, 6)
                self.ids[request] = [self._random.randrange(1000) for _ in range(length)]
                running[request] = 0
            self._step(running)

    def _step(self, running: dict[str, int]) -> None:
        rows: list[tuple[str, int, int]] = []
        entries: list[dict[str, Any]] = []
        for request in self._random.sample(sorted(running), len(running)):
            done, prompt = running[request], self.prompts[request]
            if done > prompt and self._preempts and self._random.random() < 0.1:
                # Begins anew: its positions are computed again.
                done = 0
            count = min(self._random.randint(1, 5), prompt - done) if done < prompt else 1
            rows.append((request, count, done))
            told = {"request_id": request, "prompt": prompt, "first_position": done}
            entries.append({**told, "ids": self.ids[request][done : done + count]})
            running[request] = done + count
        for request in [each for each, done in running.items() if done >= len(self.ids[each])]:
            del running[request]
        self.steps.append(rows)
        self.entries.append(entries)

    def run(self, path: Path, backend: str | Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Run:
        """The run that was captured of it: two layers and the logits."""

        def tensors(step: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            numbers = [
                [int(row["request_id"][1:].partition("-")[0]), row["first_position"] + at, step]
                for row in rows
                for at in range(row["rows"])
            ]
            codes = torch.tensor(numbers, dtype=dtype).repeat(1, WIDTH // 3)
            return {
                "layers.0".replace(".", "_"): codes,
                "layers_1": -codes.view(-1, 2, WIDTH // 2),
                "logits": torch.ones(len(rows), 2),
            }

        return requests_run(
            path, self.steps, tensors, backend=backend, extra=lambda step: {"tokens": self.entries[step]}
        )


NAMES = ["layers_0/outputs", "layers_1/outputs"]


def seen(item: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Request and position of a token's item, of which every value must tell the same."""
    codes, position, request = item[NAMES[0]], int(item["positions"]), int(item["request"])
    assert codes[:2].tolist() == codes[3:5].tolist() == [request, position]
    if NAMES[1] in item:
        assert torch.equal(item[NAMES[1]], -codes.view(2, WIDTH // 2))
    return request, position
