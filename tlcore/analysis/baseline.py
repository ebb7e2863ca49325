"""A run's statistics and hashes as one small JSON file, and another run held against it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import ConfigError, ReadError
from ..layout.dtypes import torch_dtype
from ..layout.jsontext import parse_json
from ..layout.names import PathKey
from ..reader import Run
from ..record import Json
from .measure import Tolerance
from .results import Comparison, Gap, Status, TensorResult
from .stats import Survey, TensorStatistics, stats

_VERSION = 1
_COMPARED = ("min", "max", "mean", "std")
Key = tuple[int, int, str, int, str, tuple[PathKey, ...]]


def baseline_text(run: Run, progress: Callable[[int, int], None] | None = None) -> str:
    """The file: one line a tensor, in order of execution, so that a change reads well in a diff.

    Raises ReadError for a tensor that cannot be read, as no baseline can be made of it.
    """
    survey = stats(run, progress=progress)
    lines = []
    for each in survey.tensors:
        if each.values is None:
            raise ReadError(f"{run.url}: {each.problem}")
        lines.append(json.dumps(_entry(run, each)))
    told = "".join(f"  {line},\n" for line in lines)[:-2]
    marked = "" if run.injection is None else f'"run": {json.dumps(run.injection)}, '
    return f'{{"tlcore_baseline": {_VERSION}, {marked}"tensors": [\n{told}\n]}}\n'


def _entry(run: Run, tensor: TensorStatistics) -> Json:
    values = tensor.values
    assert values is not None
    place = {
        **{"step": tensor.step, "rank": tensor.rank, "module": tensor.module, "call": tensor.call},
        **{"direction": tensor.direction, "path": list(tensor.path)},
        **{"dtype": tensor.dtype, "shape": list(tensor.shape)},
    }
    numbers = {key: _told(getattr(values, key)) for key in (*_COMPARED, "nans", "infs")}
    return {**place, **numbers, "hash": _hash(run, tensor)}


def _told(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")


def _hash(run: Run, tensor: TensorStatistics) -> str | None:
    step = run.step(tensor.step)
    if step.has_record(tensor.name):
        return cast("str | None", step.record(tensor.name).get("hash"))
    return None if tensor.values is None else tensor.values.hash


@dataclass(frozen=True, slots=True)
class _Known:
    """A tensor of the file."""

    dtype: str
    shape: tuple[int, ...]
    hash: str | None
    numbers: Mapping[str, float | None]


def check_statistics(
    file: Path,
    run: Run,
    rtol: float | None = None,
    atol: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Hold a run against a file of `baseline_text`, which is A: what has other bytes, by its statistics.

    Minimum, maximum, mean and std may differ by ``atol`` and ``rtol`` times the tensor's largest magnitude;
    None is the dtype's default.
    Raises ReadError when the file is none or the run cannot be read.
    """
    known, injection = _read(file)
    survey: Survey = stats(run, progress=progress)
    tolerance = Tolerance(rtol, atol)
    results = []
    for each in survey.tensors:
        key = (each.step, each.rank, each.module, each.call, each.direction, each.path)
        mine = known.pop(key, None)
        results.append(_result(key, mine, each, _hash(run, each), tolerance))
    results += [_result(key, mine, None, None, tolerance) for key, mine in known.items()]
    gap = Gap("values that are not equal bit by bit were held by their statistics alone")
    notes = [gap] if any(each.status == "close" for each in results) else []
    notes += [] if injection is None else [Gap(f"the run of the baseline was {injection}")]
    return Comparison(str(file), run.url, results, [*notes, *map(Gap, survey.notes)])


def _read(file: Path) -> tuple[dict[Key, _Known], str | None]:
    """The tensors of the file, and what is to be known of the run that they are of."""
    try:
        document = parse_json(file.read_text(encoding="utf-8"))
        if document["tlcore_baseline"] != _VERSION:
            raise ReadError(f"{file}: a baseline of version {document['tlcore_baseline']!r}, not {_VERSION}")
        run = document.get("run")
        return dict(map(_parsed, document["tensors"])), None if run is None else str(run)
    except OSError as error:
        raise ReadError(f"{file}: {error.strerror}") from error
    except ConfigError as error:
        raise ReadError(f"{file}: {error.problem}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ReadError(
            f"{file}: not a baseline that tlcore saved ({type(error).__name__}: {error})"
        ) from None


def _parsed(entry: Any) -> tuple[Key, _Known]:
    path = tuple(each if isinstance(each, int) else str(each) for each in entry["path"])
    key = (int(entry["step"]), int(entry["rank"]), str(entry["module"]), int(entry["call"]))
    numbers = {name: None if entry[name] is None else float(entry[name]) for name in _COMPARED}
    numbers |= {name: int(entry[name]) for name in ("nans", "infs")}
    known = _Known(str(entry["dtype"]), tuple(map(int, entry["shape"])), entry["hash"], numbers)
    return (*key, str(entry["direction"]), path), known


def _result(
    key: Key, mine: _Known | None, other: TensorStatistics | None, digest: str | None, tolerance: Tolerance
) -> TensorResult:
    step, rank, module, call, direction, path = key
    status, reason = _status(mine, other, digest, tolerance)
    name = other.name if other is not None else f"step_{step}/{module or '_root'}/{direction}"
    return TensorResult(
        *(status, step, rank, module, call, direction, path),
        names=(name if mine is not None else None, name if other is not None else None),
        dtypes=(None if mine is None else mine.dtype, None if other is None else other.dtype),
        shapes=(None if mine is None else mine.shape, None if other is None else other.shape),
        reason=reason,
    )


def _status(
    mine: _Known | None, other: TensorStatistics | None, digest: str | None, tolerance: Tolerance
) -> tuple[Status, str | None]:
    if mine is None or other is None:
        return "missing", f"only {'B' if mine is None else 'A'} has it"
    if other.values is None:
        return "unreadable", other.problem
    if (mine.dtype, mine.shape) != (other.dtype, other.shape):
        return "different", f"{mine.dtype} {mine.shape} against {other.dtype} {other.shape}"
    if mine.hash is not None and mine.hash == digest:
        return "bitwise", None
    apart = list(_apart(mine, other, tolerance))
    return ("different", ", ".join(apart)) if apart else ("close", None)


def _apart(mine: _Known, other: TensorStatistics, tolerance: Tolerance) -> Iterator[str]:
    assert other.values is not None
    dtype = torch_dtype(mine.dtype) or torch.float32
    rtol, atol = tolerance.of(dtype, dtype)
    theirs = {key: _told(getattr(other.values, key)) for key in (*_COMPARED, "nans", "infs")}
    sizes = [abs(side[key] or 0.0) for side in (mine.numbers, theirs) for key in ("min", "max")]
    # What the file rounds to nine digits may differ by that.
    limit = atol + (rtol + 1e-8) * max(sizes)
    for key, one in mine.numbers.items():
        two = theirs[key]
        exact = key in ("nans", "infs") or one is None or two is None
        if (one != two) if exact else abs(cast(float, one) - cast(float, two)) > limit:
            yield f"{key} {_shown(one)} against {_shown(two)}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
