"""What was captured of one request, for its client: once it is stored by all ranks, and never before."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ....errors import CaptureError, MissingError
from ....layout.dtypes import item_size
from ....reader import open_run
from ....reader.request import Request
from ....reader.run import Run
from ....record import Json
from ..reports import read_reports
from .status import FLUSH, raise_refusal

# How often it is asked whether a flush is over; the engine answers between two of its steps.
_POLL_S = 0.01
_LONGEST_POLL_S = 0.2
# A flush that is not over by then is given up.
_LONGEST_S = 60.0
# Of the tensors of one request, and of all that are being fetched: at times they are there twice.
MOST_BYTES = 2 << 30
# What stands at the end of a stored tensor's name: its device, with the rank where several share that.
_DEVICE = re.compile(r"(.+?)_[a-z]+(?:_[0-9]+)?(?:_rank_[0-9]+)?(?:~[0-9]+)?", re.DOTALL)
Ask = Callable[..., Awaitable[list[Json]]]


class LargeError(CaptureError):
    """There is more of a request than is fetched at once."""


class LateError(CaptureError):
    """Not every rank has stored in time what was asked for."""


class LostError(CaptureError):
    """Every rank has done what it could, and something of the request could not be stored."""


class NothingError(MissingError):
    """There is no such request, or its token is another; which of the two is told to nobody."""


class Flush:
    """One flush of all engines, for all who ask before it begins, and what is read after it."""

    def __init__(self, answers: Sequence[Json] = ()) -> None:
        self.requests: set[str] = set()
        # Those of the workers.
        self.answers = list(answers)
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self.over = asyncio.Event()
        self.error: Exception | None = None

    @property
    def missing(self) -> list[int]:
        """The ranks that have not stored everything."""
        return sorted(answer["rank"] for answer in self.answers if not answer["done"])

    def run(self, url: str, options: Callable[[str], Any]) -> Run:
        """A run as it was after this flush, opened once: its index has the steps of others, too."""
        with self._lock:
            if url not in self._runs:
                self._runs[url] = open_run(url, storage_options=options(url))
            return self._runs[url]


class Flusher:
    """Has engines store what they have captured, one flush at a time; ``ask`` calls all of their workers."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._next: Flush | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def flush(self, requests: set[str], within_s: float) -> Flush:
        """What the workers say of these requests once everything is stored. Raises LateError."""
        flush = self._next
        if flush is None:
            flush = self._next = Flush()
            task = asyncio.create_task(self._run(flush))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        flush.requests |= requests
        try:
            await asyncio.wait_for(flush.over.wait(), within_s)
        except asyncio.TimeoutError:
            raise _late(flush, within_s) from None
        if flush.error is not None:
            raise flush.error
        return flush

    async def _run(self, flush: Flush) -> None:
        async with self._lock:
            # Who asks from now on, asks for a later one.
            self._next = None
            ticket, requests = secrets.token_hex(8), sorted(flush.requests)
            deadline, pause = time.monotonic() + _LONGEST_S, _POLL_S
            try:
                while (left := deadline - time.monotonic()) > 0:
                    # An engine that is stuck must not keep those who ask later from asking.
                    flush.answers = await asyncio.wait_for(self._ask(FLUSH, ticket, requests), left)
                    raise_refusal(flush.answers)
                    if not flush.missing:
                        break
                    await asyncio.sleep(pause)
                    pause = min(_LONGEST_POLL_S, pause * 1.5)
                else:
                    flush.error = LateError(f"ranks {flush.missing} have not stored the request")
            except asyncio.TimeoutError:
                stopped = _stopped()
                who = f"the engine, of which ranks {stopped} are stopped," if stopped else "the engine"
                flush.error = LateError(f"{who} has not answered within {_LONGEST_S:g} s")
            except Exception as error:
                flush.error = error
            flush.over.set()


def _late(flush: Flush, within_s: float) -> LateError:
    """Who has not stored in time: those who say so, or, where no answer has come, those who are stopped."""
    missing, stopped = flush.missing, _stopped()
    which = f"ranks {missing or stopped}" if missing or stopped else "the engine's ranks"
    why = "" if missing or not stopped else ": their processes are stopped"
    return LateError(f"{which} have not stored the request within {within_s:g} s{why}")


def _stopped() -> list[int]:
    """The ranks of this front end whose processes somebody has stopped."""
    return sorted({report.rank for report in read_reports() if report.stopped})


def stored_request(flush: Flush, request_id: str, options: Callable[[str], Any]) -> Request:
    """A request as it is stored after a flush, where the workers say that it is; ``options`` go with a URL.

    Raises NothingError where nothing was captured of it; where steps of it are not stored, LateError if they
    may come from a spill_dir yet, otherwise LostError.
    """
    known = [each["requests"][request_id] for each in flush.answers if request_id in each["requests"]]
    nothing = NothingError("nothing was captured of this request")
    if not known:
        raise nothing
    # The last run, should one have followed another meanwhile.
    run_id = max(each["run_id"] for each in known)
    own = [each for each in known if each["run_id"] == run_id]
    run = flush.run(str(own[0]["url"]), options)
    steps = []
    for number in sorted({step for each in own for step in each["steps"]}):
        try:
            step = run.step(number)
        except MissingError:
            step = None
        if step is None or not step.complete:
            raise _not_stored(number, flush.answers)
        steps.append(step)
    found = Request(run.url, request_id, None, steps)
    if not found.names:
        # It shared steps with others, and none of its own positions was to be captured.
        raise nothing
    return found


def _not_stored(number: int, answers: list[Json]) -> CaptureError:
    waiting = next((each["waiting"] for each in answers if "waiting" in each), None)
    if waiting is not None:
        return LateError(f"step {number} of the run is not stored by every rank yet: {waiting}")
    problem = next((f": {each['problem']}" for each in answers if "problem" in each), "")
    return LostError(f"step {number} of the run could not be stored by every rank, and is lost{problem}")


def joined_names(request: Request) -> dict[str, str]:
    """The names of a request's tensors as ``<module>/<stem>``, without devices, and one stored name of each.

    What the ranks have of a tensor goes by one name. Where names of one rank are told apart by more than the
    device, all stay as they are.
    """
    groups: dict[str, list[str]] = {}
    for name in request.names:
        match = _DEVICE.fullmatch(name)
        groups.setdefault(match[1] if match else name, []).append(name)
    found: dict[str, str] = {}
    for plain, names in groups.items():
        found |= {each: each for each in names} if any("~" in each for each in names) else {plain: names[0]}
    return found


def described(request: Request, public_id: str, index: int) -> Json:
    """A request as JSON data, for which no tensor is read."""
    tensors = {}
    for plain, name in joined_names(request).items():
        dtype, shape = request.dtype_and_shape(name, unshard=True)
        tensors[plain] = {
            "dtype": dtype,
            "shape": shape,
            "positions": request.positions(name),
            "gaps": [list(gap) for gap in request.gaps(name)],
        }
    return {
        "id": public_id,
        "index": index,
        "request_id": request.request_id,
        "run": request.url,
        "steps": request.steps,
        "tensors": tensors,
        "token_ids": _token_ids(request),
        "prompt_length": request.prompt_length,
    }


def _token_ids(request: Request) -> list[int] | None:
    try:
        return [int(each) for each in request.token_ids]
    except MissingError:
        return None


def size_of(request: Request) -> int:
    """How many bytes the joined tensors have together, as the records say. Raises LargeError."""
    size = 0
    for name in joined_names(request).values():
        dtype, shape = request.dtype_and_shape(name, unshard=True)
        size += math.prod(shape) * (item_size(dtype) or 1)
    if size > MOST_BYTES:
        text = f"the request's tensors have {size} bytes, and {MOST_BYTES} are fetched at most"
        raise LargeError(f"{text}; choose fewer modules or rows, or read the run")
    return size


class Held:
    """Room for some bytes, which is free again once nobody has this any more."""


class Room:
    """Bounds the bytes of all tensors that are being fetched from this process, together."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._taken = 0
        # What is held may be forgotten in any thread.
        self._lock = threading.Lock()

    async def take(self, size: int, deadline: float) -> Held:
        """Wait until there is room. Raises LateError."""
        while not self._try(size):
            if time.monotonic() > deadline:
                raise LateError("so much else is being fetched that there was no room for this in time")
            await asyncio.sleep(_LONGEST_POLL_S)
        held = Held()
        weakref.finalize(held, self._give_back, size)
        return held

    def _try(self, size: int) -> bool:
        with self._lock:
            fits = not (size and self._taken) or self._taken + size <= self._most
            self._taken += size if fits else 0
        return fits

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._taken -= size


def as_safetensors(request: Request) -> bytes:
    """A request's joined tensors and token ids as one safetensors file."""
    import torch
    from safetensors.torch import save

    tensors = {
        plain: request.tensor(name, unshard=True).contiguous()
        for plain, name in joined_names(request).items()
    }
    ids = _token_ids(request)
    if ids is not None:
        tensors["token_ids"] = torch.tensor(ids, dtype=torch.int64)
    return bytes(save(tensors, {"request_id": request.request_id}))
