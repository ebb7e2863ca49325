"""`compare`: pairs the tensors of two runs and measures them in parallel, one pair a worker."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, ReadError
from ..layout.dtypes import torch_dtype
from ..locations import is_url
from ..reader import Run
from ..reader.lasting import lasting_objects
from .details import Details
from .experts import without_reordered
from .makings import causes, injections, other_kernels
from .matching.counting import none_in_common
from .matching.match import match
from .matching.pairs import Matching, Pair
from .matching.rules import Rules, compiled_patterns, positions, renames
from .measure import Tolerance
from .noise.advice import advice, other_batches
from .noise.counterparts import Pieces
from .noise.further import Further, RunLike, opened_run, path_of
from .other_code import other_code
from .results import Comparison, Origin, TensorResult
from .rulebook import Rulebook, RulesLike, rulebook
from .schedule import in_order
from .stats import why_not_stored
from .work import Task, details_of, place_of, share, unshare

Progress = Callable[[int, int], None]
# A remote read mostly waits, so that more of them than there are cores keep the cores busy.
_REMOTE_WORKERS = 8
_DETAILED = 20
# As many values take a few hundredths of a second.
_DETAILED_VALUES = 1 << 22


@lasting_objects()
def compare(
    a: RunLike,
    b: RunLike,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    by_norm: bool = False,
    steps: Iterable[int] | None = None,
    modules: str | Iterable[str] = (),
    maps: str | Iterable[str] = (),
    sums: Iterable[int] = (),
    requests: Mapping[str, str] | None = None,
    ignore_missing: bool = False,
    check_dtype: bool = False,
    deep: bool = False,
    noise: RunLike | Sequence[RunLike] = (),
    noise_factor: float = 3.0,
    rules: RulesLike | None = None,
    storage_options: Mapping[str, Any] | None = None,
    storage_options_b: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two runs, given as paths, URLs or opened runs, tensor by tensor in order of execution.

    ``rtol`` and ``atol`` default by dtype, as in `torch.testing.assert_close`; they hold for each value, or
    with ``by_norm`` for the norm of each tensor, and four times of them for that of each of its rows, as the
    defaults do between two floating dtypes, and between vLLM's runs that other kernels computed (one engine
    compiles, the other does not), with what these round. ``steps`` and
    ``modules`` (regular expressions, or one) limit what is compared. ``maps`` are ``REGEX=REPLACEMENT``
    texts, or one, that turn A's module names into B's.
    ``sums`` are the output positions of a value that one run keeps in two parts, ``(0, 1)`` for vLLM's
    hidden state and residual. vLLM runs are compared per request and position; requests are found by their
    prompts, and ``requests`` maps ids of A to ids of B where that is not enough. ``ignore_missing`` leaves
    out what only one run has. ``deep`` reads also what equal hashes settle.

    ``noise`` are further runs of the reference A, or one, that differ from it in what must not matter: other
    batches, a rerun, other kernels. A tensor is then different where A is more than ``noise_factor`` times as
    far from B as from any of them, whatever the dtype's tolerance says; one that they lack is held against
    its tolerance. ``rtol`` and ``atol``, where given, must be exceeded as well.

    ``rules`` are a JSON file, or the same as a mapping, with tolerances by the names of tensors, what must
    be there and what is left out; what none of them fits is held as without them. With ``noise`` they must
    be broken as well.

    ``storage_options`` go to the fsspec filesystem of a URL, also of ``noise``, ``storage_options_b`` to B's
    where it needs others. Any ``executor`` does the work (by default threads, one a core, more for URLs); in
    other processes it opens the runs again, so give them as paths. ``progress`` is called with the number of
    pairs done and in all.

    Raises ReadError when a run cannot be opened or there is nothing to compare, ConfigError for a
    pattern, tolerance, rule or request that is none, BackendError when a URL cannot be opened.
    """
    options_a = dict(storage_options or {})
    options_b = options_a if storage_options_b is None else dict(storage_options_b)
    runs = opened_run(a, options_a), opened_run(b, options_b)
    book = rulebook(rules)
    pairing = _pairing(book, maps, sums, steps, modules, requests, ignore_missing)
    tolerance, kernels = _tolerances(runs, rtol, atol, by_norm)
    further = Further.of(noise, noise_factor, runs, options_a)
    places = place_of(path_of(a), options_a), place_of(path_of(b), options_b), *further.places
    task = Task(places, tolerance, check_dtype, uuid.uuid4().hex, book)
    return _compared(
        runs, pairing, task, further, kernels, _pool(executor, *runs, *further.runs), deep, progress
    )


def _pairing(
    book: Rulebook,
    maps: str | Iterable[str],
    sums: Iterable[int],
    steps: Iterable[int] | None,
    modules: str | Iterable[str],
    requests: Mapping[str, str] | None,
    ignore_missing: bool,
) -> Rules:
    """Which tensors are held against which, checked. Raises ConfigError."""
    return Rules(
        maps=renames(maps),
        sums=positions(sums),
        steps=None if steps is None else frozenset(steps),
        modules=compiled_patterns(modules, "modules"),
        requests=tuple((requests or {}).items()),
        ignore_missing=ignore_missing,
        require=book.require,
        leave_out=book.leave_out,
    )


def _tolerances(
    runs: tuple[Run, Run], rtol: float | None, atol: float | None, by_norm: bool
) -> tuple[Tolerance, list[str]]:
    """The tolerance, and by what the kernels of the two runs differ, which it then allows for."""
    tolerance = _tolerance(rtol, atol, by_norm)
    kernels = other_kernels(*runs) if rtol is atol is None else []
    return (replace(tolerance, norm=True, kernels=True) if kernels else tolerance), kernels


def _compared(
    runs: tuple[Run, Run],
    pairing: Rules,
    task: Task,
    further: Further,
    kernels: Sequence[str],
    workers: AbstractContextManager[Executor],
    deep: bool,
    progress: Progress | None,
) -> Comparison:
    """Pair the tensors, measure each pair, and say what is to be known of them."""
    _check_steps(pairing, *runs)
    # A run lets go of steps that nobody holds; their records would be read again for every pair.
    held = [run.step(number) for run in (*runs, *further.runs) for number in run.steps]
    matching = _matched(*runs, pairing)
    pieces = [(pair, each) for pair in matching.pairs for each in pair.pieces]
    share(task, *runs, *further.runs)
    try:
        with workers as pool:
            results = _measured(task, runs, matching.pairs, deep, pool, progress)
            if further.runs:
                results = further.judge(pool, task, runs, pairing, pieces, results)
    finally:
        unshare(task)
    results, pieces, reordered = without_reordered(results, pieces, other_batches(pieces))
    results = _detailed(runs, pieces, results)
    origin = Origin(runs, pieces, held, matching.left_out)
    notes = [*matching.notes, *reordered, *_notes(runs, results, task.tolerance, further)]
    if not further.runs:
        notes += [*_rounded(kernels), *advice(*runs, pieces, results)]
    notes += other_code(matching.missing, runs)
    return Comparison(
        runs[0].url, runs[1].url, [*results, *matching.missing], notes, further.to_json(), origin
    )


def _notes(
    runs: tuple[Run, Run], results: Sequence[TensorResult], tolerance: Tolerance, further: Further
) -> Iterator[str]:
    """What to know of two runs and of how their tensors were held against each other."""
    yield from causes(*runs)
    yield from _mixed(results, tolerance)
    yield from further.notes(results)
    yield from injections(runs)
    yield from _other_shares(results, *runs)


def _detailed(
    runs: tuple[Run, Run], pieces: Sequence[tuple[Pair, Pieces]], results: Sequence[TensorResult]
) -> list[TensorResult]:
    """The results with the details of those that differ first: each means reading its tensors again.

    Of large ones that are fewer; the first always is among them.
    """
    found = list(results)
    differing = [at for at, each in enumerate(found) if each.status == "different" and each.measures]
    first = next((at for at, each in enumerate(found) if each.status == "close"), None)
    known: dict[object, Details] = {}
    values = 0
    for at in [*differing[:_DETAILED], *([] if first is None else [first])]:
        pair, each = pieces[at]
        if values >= _DETAILED_VALUES:
            break
        values += math.prod(found[at].shapes[0] or ())
        contents = *((r.get("hash") or id(r), r["dtype"]) for r in (*pair.a.records, *pair.b.records)), each
        # What could be read before may be gone.
        with suppress(ReadError):
            details = found[at].details or known.get(contents) or details_of(runs, pair, each)
            known[contents] = details
            found[at] = replace(found[at], details=details)
    return found


def _rounded(kernels: Sequence[str]) -> Iterator[str]:
    """What to know of runs that other kernels computed."""
    if kernels:
        yield (
            f"other kernels computed A and B, {', '.join(kernels)}: they are held by the norms of tensors and"
            " rows, float32 to 1e-05, which these round; --noise holds them against a further run"
        )


def _other_shares(results: Sequence[TensorResult], a: Run, b: Run) -> Iterator[str]:
    """What to know where other shapes may come from other numbers of ranks."""
    if a.world_size != b.world_size and any((each.reason or "").startswith("shapes ") for each in results):
        ranks = f"{a.world_size} rank{'s' * (a.world_size > 1)} against {b.world_size}"
        yield (
            f"shapes and ranks differ ({ranks}): tensors are joined where DTensors or vLLM's layers"
            " tell how, all others are compared as each rank has them"
        )


def _mixed(results: Sequence[TensorResult], tolerance: Tolerance) -> list[str]:
    """What to know of tensors of different floating dtypes."""
    for a, b in dict.fromkeys(each.dtypes for each in results):
        dtypes = torch_dtype(a), torch_dtype(b)
        if dtypes[0] and dtypes[1] and tolerance.between(dtypes[0], dtypes[1]) != tolerance:
            return [f"{a} is held against {b} by the norms of tensors and rows; rounding adds up: see --rtol"]
    return []


def _tolerance(rtol: float | None, atol: float | None, by_norm: bool) -> Tolerance:
    for where, given in (("rtol", rtol), ("atol", atol)):
        if given is not None and not given >= 0:
            raise ConfigError(where, f"{given} is not a tolerance, which is a number >= 0")
    return Tolerance(rtol, atol, by_norm)


def _matched(a: Run, b: Run, rules: Rules) -> Matching:
    """Raises ReadError where nothing is left to compare."""
    matching = match(a, b, rules)
    if not matching.pairs and not matching.missing:
        limits = " in the modules asked for" if rules.modules else ""
        limits += ", but for what the rules leave out" if rules.leave_out else ""
        raise ReadError(f"{a.url} and {b.url}: no tensor to compare{limits}{_kept_apart(a, b)}")
    return matching


def _kept_apart(a: Run, b: Run) -> str:
    """What was kept in place of tensors, and what compares that."""
    kinds = {str((run.document.get("config") or {}).get("capture")) for run in (a, b)} - {"tensor", "both"}
    if kinds == {"stats"}:
        return " (statistics alone: `tlcore baseline save --stats` and `check` compare these)"
    if kinds == {"channels"}:
        return " (statistics of channels alone: see run.channels)"
    if a.steps and b.steps and not {*a.steps} & {*b.steps}:
        return f" ({none_in_common(a.steps, b.steps)})"
    return why_not_stored([run.step(number) for run in (a, b) for number in run.steps])


def _check_steps(rules: Rules, a: Run, b: Run) -> None:
    """Raises ReadError when neither run has any of the steps that were asked for."""
    held = [[*run.steps, *run.incomplete_steps] for run in (a, b)]
    if rules.steps and rules.steps.isdisjoint(held[0] + held[1]):
        asked, has = (", ".join(map(str, each)) for each in (sorted(rules.steps), sorted(held[0])))
        other = ", ".join(map(str, sorted(held[1])))
        raise ReadError(f"neither run has step {asked}; A has {has or 'none'}, B has {other or 'none'}")


def _measured(
    task: Task,
    runs: tuple[Run, Run],
    pairs: Sequence[Pair],
    deep: bool,
    pool: Executor,
    progress: Progress | None,
) -> list[TensorResult]:
    results: list[TensorResult] = []
    for done, found in enumerate(in_order(pool, task, pairs, runs, deep), 1):
        results += found
        if progress is not None:
            progress(done, len(pairs))
    return results


def _pool(executor: Executor | None, *runs: Run) -> AbstractContextManager[Executor]:
    return ThreadPoolExecutor(_workers(*runs)) if executor is None else nullcontext(executor)


def _workers(*runs: Run) -> int:
    cores = os.cpu_count() or 1
    return max(cores, _REMOTE_WORKERS) if any(is_url(run.url) for run in runs) else cores
