"""The engines behind one API server process: asked all together, since each serves some of the requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from ....errors import CaptureError
from ....record import Json
from .check import unknown_vllm

# How often it is seen whether an engine that does not answer is alive.
_LOOK_S = 0.5
# How long one that failed may take to its end, and how often that is looked at.
_ENDING_S, _SOON_S = 5.0, 0.05


class DeadEngineError(CaptureError):
    """An engine has died, so nobody can say what it captures; the server's log does."""


class Engines:
    """All engines of a client: one, or as many as there are data-parallel replicas."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._core: Any = getattr(client, "engine_core", None)
        # vLLM's own collective call returns the answers of the first engine only.
        self.all: list[Any] = list(getattr(self._core, "core_engines", None) or [None])
        parallel = client.vllm_config.parallel_config
        self.ranks = int(parallel.world_size) * len(self.all)
        if len(self.all) > 1 and not hasattr(self._core, "_call_utility_async"):
            raise unknown_vllm(f"{type(self._core).__name__} has no way to ask a single engine")

    async def ask(self, method: str, *args: Any, engines: list[Any] | None = None) -> list[Json]:
        """The answers of all workers of these engines, all by default.

        Raises DeadEngineError when an engine dies before it has answered.
        """
        chosen = self.all if engines is None else engines
        asked = asyncio.ensure_future(asyncio.gather(*(self._ask(engine, method, args) for engine in chosen)))
        while not asked.done():
            dead = self._dead
            await asyncio.wait({asked}, timeout=_LOOK_S)
            if dead and not asked.done():
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asked
                raise DeadEngineError("an engine has died; the server's log says how")
        try:
            return [answer for answers in asked.result() for answer in answers]
        except Exception as error:
            if await self._ends():
                raise DeadEngineError("an engine has died; the server's log says how") from error
            raise

    async def _ends(self) -> bool:
        """Whether an engine that failed is dead: its failure may arrive before its end is noticed."""
        end = time.monotonic() + _ENDING_S
        while not self._dead and time.monotonic() < end:
            await asyncio.sleep(_SOON_S)
        return self._dead

    @property
    def _dead(self) -> bool:
        return bool(getattr(getattr(self._core, "resources", None), "engine_dead", False))

    async def _ask(self, engine: Any, method: str, args: tuple[Any, ...]) -> list[Json]:
        if len(self.all) == 1:
            found: list[Json] = await self._client.collective_rpc(method, args=args)
        else:
            call = self._core._call_utility_async
            found = await call("collective_rpc", method, None, args, None, engine=engine)
        return found
