"""`compare`: pairs the tensors of two runs and measures them in parallel, one pair a worker."""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext

from ..errors import ReadError
from ..reader import Run, open_run
from .match import Pair, Rules, compiled_pattern, match, renames
from .measure import Tolerance
from .results import Comparison, TensorResult
from .work import Task, compare_pair, share, unshare

RunLike = Run | str | os.PathLike[str]
Progress = Callable[[int, int], None]


def compare(
    a: RunLike,
    b: RunLike,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    steps: Iterable[int] | None = None,
    modules: Iterable[str] = (),
    maps: Iterable[str] = (),
    sums: Iterable[int] = (),
    requests: Mapping[str, str] | None = None,
    check_dtype: bool = False,
    deep: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two runs, given as paths or opened runs, tensor by tensor in order of execution.

    ``rtol`` and ``atol`` default by dtype, as in `torch.testing.assert_close`. ``steps`` and ``modules``
    (regular expressions) limit what is compared. ``maps`` are ``REGEX=REPLACEMENT`` texts that turn A's
    module names into B's. ``sums`` are output positions to be added where the other run has a single
    output, ``(0, 1)`` for vLLM's decoder layers. vLLM runs are compared per request and position;
    ``requests`` maps A's request ids to B's where they differ. ``deep`` reads also what equal hashes
    settle. ``executor`` does the work (a thread pool by default); ``progress`` is called with the number
    of pairs done and in all.

    Raises ReadError when a run cannot be opened or there is nothing to compare, ConfigError for a
    pattern that is none.
    """
    run_a, run_b = _open(a), _open(b)
    rules = Rules(
        maps=renames(maps),
        sums=tuple(sums),
        steps=None if steps is None else frozenset(steps),
        modules=tuple(compiled_pattern(text, "modules") for text in modules),
        requests=tuple((requests or {}).items()),
    )
    matching = match(run_a, run_b, rules)
    if not matching.pairs and not matching.missing:
        raise ReadError(f"{run_a.url} and {run_b.url}: no tensor to compare")
    task = Task(_place(a), _place(b), Tolerance(rtol, atol), deep, check_dtype, uuid.uuid4().hex)
    own = ThreadPoolExecutor(_workers()) if executor is None else nullcontext(executor)
    results: list[TensorResult] = []
    share(task, run_a, run_b)
    try:
        with own as pool:
            for done, found in enumerate(_in_order(pool, task, matching.pairs), 1):
                results += found
                if progress is not None:
                    progress(done, len(matching.pairs))
    finally:
        unshare(task)
    return Comparison(run_a.url, run_b.url, [*results, *matching.missing], matching.notes)


def _open(run: RunLike) -> Run:
    return run if isinstance(run, Run) else open_run(run)


def _place(run: RunLike) -> str:
    """How another process opens the run."""
    return run.url if isinstance(run, Run) else os.fspath(run)


def _workers() -> int:
    return os.cpu_count() or 1


def _in_order(pool: Executor, task: Task, pairs: Iterable[Pair]) -> Iterator[list[TensorResult]]:
    """Results in the pairs' order, with a bounded number of pairs handed out ahead."""
    waiting: deque[Future[list[TensorResult]]] = deque()
    try:
        for pair in pairs:
            waiting.append(pool.submit(compare_pair, task, pair))
            if len(waiting) >= 4 * _workers():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
