"""What was captured of one request, for its client: once it is stored by all ranks, and never before."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ....errors import CaptureError, MissingError
from ....reader import open_run
from ....reader.request import Request
from ....record import Json
from .status import FLUSH, raise_refusal

# How often it is asked whether a flush is over; the engine answers between two of its steps.
_POLL_S = 0.01
_LONGEST_POLL_S = 0.2
# A flush that is not over by then is given up.
_LONGEST_S = 60.0
# What stands at the end of a stored tensor's name: its device, with the rank where several share that.
_DEVICE = re.compile(r"(.+?)_[a-z]+(?:_[0-9]+)?(?:_rank_[0-9]+)?(?:~[0-9]+)?", re.DOTALL)
Ask = Callable[..., Awaitable[list[Json]]]


class LateError(CaptureError):
    """Not every rank has stored in time what was asked for."""


class NothingError(MissingError):
    """There is no such request, or its token is another; which of the two is told to nobody."""


class _Flush:
    """One flush of all engines, for all who ask before it begins."""

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self.answers: list[Json] = []
        self.over = asyncio.Event()
        self.error: Exception | None = None

    @property
    def missing(self) -> list[int]:
        """The ranks that have not stored everything."""
        return sorted(answer["rank"] for answer in self.answers if not answer["done"])


class Flusher:
    """Has engines store what they have captured, one flush at a time; ``ask`` calls all of their workers."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._next: _Flush | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def flush(self, requests: set[str], within_s: float) -> list[Json]:
        """The workers' answers of these requests once everything is stored. Raises LateError."""
        flush = self._next
        if flush is None:
            flush = self._next = _Flush()
            task = asyncio.create_task(self._run(flush))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        flush.requests |= requests
        try:
            await asyncio.wait_for(flush.over.wait(), within_s)
        except asyncio.TimeoutError:
            which = f"ranks {flush.missing}" if flush.missing else "the engine's ranks"
            raise LateError(f"{which} have not stored the request within {within_s:g} s") from None
        if flush.error is not None:
            raise flush.error
        return flush.answers

    async def _run(self, flush: _Flush) -> None:
        async with self._lock:
            # Who asks from now on, asks for a later one.
            self._next = None
            ticket, requests = secrets.token_hex(8), sorted(flush.requests)
            deadline, pause = time.monotonic() + _LONGEST_S, _POLL_S
            try:
                while time.monotonic() < deadline:
                    flush.answers = await self._ask(FLUSH, ticket, requests)
                    raise_refusal(flush.answers)
                    if not flush.missing:
                        break
                    await asyncio.sleep(pause)
                    pause = min(_LONGEST_POLL_S, pause * 1.5)
                else:
                    flush.error = LateError(f"ranks {flush.missing} have not stored the request")
            except Exception as error:
                flush.error = error
            flush.over.set()


def stored_request(answers: list[Json], request_id: str, options: Callable[[str], Any]) -> Request:
    """A request as it is stored, where the workers' ``answers`` say that it is; ``options`` go with a URL.

    Raises NothingError where nothing was captured of it, LateError where steps of it are not stored.
    """
    known = [each["requests"][request_id] for each in answers if request_id in each["requests"]]
    if not known:
        raise NothingError("nothing was captured of this request")
    # The last run, should one have followed another meanwhile.
    run_id = max(each["run_id"] for each in known)
    own = [each for each in known if each["run_id"] == run_id]
    url = str(own[0]["url"])
    run = open_run(url, storage_options=options(url))
    steps = []
    for number in sorted({step for each in own for step in each["steps"]}):
        try:
            step = run.step(number)
        except MissingError:
            step = None
        if step is None or not step.complete:
            problem = next((f": {each['problem']}" for each in answers if "problem" in each), "")
            raise LateError(f"step {number} of the run is not stored by every rank{problem}")
        steps.append(step)
    return Request(run.url, request_id, None, steps)


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
    """A request as JSON data."""
    tensors = {}
    for plain, name in joined_names(request).items():
        tensor = request.tensor(name, unshard=True)
        tensors[plain] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
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
