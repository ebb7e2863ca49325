"""The further runs of the reference that a comparison is held against."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...reader import Run, open_run
from ...record import Json
from ..matching.match import match
from ..matching.pairs import Pair
from ..matching.rules import Rules
from ..results import TensorResult
from ..work import Place, Task, place_of
from .advice import known_apart, other_batches
from .counterparts import Counterparts, Pieces
from .levels import Item, judged, measured_in

RunLike = Run | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Further:
    """The opened runs, how other processes open them, and how often a difference may be their noise."""

    runs: tuple[Run, ...]
    places: tuple[Place, ...]
    factor: float

    @classmethod
    def of(
        cls,
        noise: RunLike | Sequence[RunLike],
        factor: float,
        compared: tuple[Run, Run],
        options: Mapping[str, Any],
    ) -> Further:
        """Open the runs. Raises ConfigError for a factor that is none or B itself, else as `open_run`."""
        if not 0 < factor < float("inf"):
            raise ConfigError("noise_factor", f"{factor} is not a factor, which is a number > 0")
        given = [noise] if isinstance(noise, (Run, str, os.PathLike)) else list(noise)
        runs = tuple(opened_run(each, options) for each in given)
        a, b = compared
        for run in runs:
            if run.id == b.id != a.id:
                problem = f"{run.url} is B itself, and no difference is beyond itself; give further runs of A"
                raise ConfigError("noise", problem)
        return cls(runs, tuple(place_of(path_of(each), dict(options)) for each in given), factor)

    def judge(
        self,
        pool: Executor,
        task: Task,
        runs: tuple[Run, Run],
        rules: Rules,
        pieces: Sequence[tuple[Pair, Pieces]],
        results: Sequence[TensorResult],
    ) -> list[TensorResult]:
        """The results for all pieces anew, as their noise says."""
        plain = Rules(steps=rules.steps)
        counterparts = Counterparts([match(runs[0], run, plain).pairs for run in self.runs])
        items: dict[int, Item] = {}
        for place, ((pair, each), result) in enumerate(zip(pieces, results, strict=True)):
            if result.measures is not None and result.status in ("close", "different"):
                found = tuple(counterparts.of(pair, each[0]))
                if found:
                    items[place] = (pair, each, found)
        measured = measured_in(pool, task, items)
        asked = task.tolerance.rtol is not None or task.tolerance.atol is not None
        # What one of two tools made need not be what the other would have, bit by bit.
        alike = runs[0].document.get("backend") == runs[1].document.get("backend") or not any(
            run.is_foreign for run in runs
        )
        exact = alike and not other_batches(pieces) and not any(known_apart(*runs, pieces))
        return list(judged(results, items, measured, self.factor, exact, asked))

    def notes(self, results: Sequence[TensorResult]) -> Iterator[str]:
        """What to know of the noise."""
        if not self.runs:
            return
        held = [each for each in results if each.noise is not None]
        beyond = sum(each.status == "different" for each in held)
        runs = "one further run" if len(self.runs) == 1 else f"{len(self.runs)} further runs"
        yield (
            f"{len(held)} tensors that differ were held against the noise of {runs} of A: {beyond} are beyond"
            f" {self.factor:g} times it"
        )
        if held and not any(each.noise and each.noise.noise for each in held):
            yield "the further runs are equal to A bit by bit in these tensors, so that any difference counts"
        elif held and not any(each.noise and each.noise.seen for each in held):
            yield (
                "the further runs are equal to A bit by bit in these tensors, though A and B are of different"
                " batches or makings: they do not show that noise, and the tolerances hold; give others"
            )
        rest = sum(each.noise is None and each.status in ("close", "different") for each in results)
        if rest:
            yield f"{rest} tensors that differ have no counterpart in them; the tolerance holds for these"

    def to_json(self) -> Json | None:
        """A JSON object, None without any run."""
        if not self.runs:
            return None
        return {"runs": [run.url for run in self.runs], "factor": self.factor}


def opened_run(run: RunLike, options: Mapping[str, Any]) -> Run:
    """The run, opened unless it is. Raises as `open_run`."""
    return run if isinstance(run, Run) else open_run(run, options or None)


def path_of(run: RunLike) -> Run | Path | str:
    """What `place_of` takes."""
    return run if isinstance(run, Run) else os.fspath(run)
