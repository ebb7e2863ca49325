"""Two data-parallel engines behind what the tests use of `vllm.LLM`; either may serve a request."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine, Sequence
from queue import Queue
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 600.0


class Replicas:
    """An asynchronous client whose loop runs in a thread of its own; it must be closed."""

    def __init__(self, model: str, **arguments: Any) -> None:
        from tlcore.adapters.vllm.frontend.engines import Engines

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = self._wait(_client(model, arguments))
        self._engines = Engines(self._client)
        self._outputs: Queue[Any] = Queue()
        self._running = 0
        self._numbers = itertools.count()
        self.vllm_config = self._client.vllm_config

    @property
    def llm_engine(self) -> Replicas:
        """What takes and gives back single requests, too."""
        return self

    def generate(self, prompts: Sequence[Any], sampling: Sequence[Any], use_tqdm: bool = False) -> list[Any]:
        """The last output of each request; all are put in at once, and numbered through."""

        async def last(prompt: Any, params: Any) -> Any:
            output = None
            async for each in self._client.generate(prompt, params, str(next(self._numbers))):
                output = each
            return output

        async def together() -> list[Any]:
            return await asyncio.gather(*map(last, prompts, sampling))

        return self._wait(together())

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        """Put a request in; `step` gives its outputs."""

        async def hand_on() -> None:
            try:
                async for each in self._client.generate(prompt, params, name):
                    self._outputs.put(each)
            finally:
                self._outputs.put(None)

        self._running += 1
        asyncio.run_coroutine_threadsafe(hand_on(), self._loop)

    def abort_request(self, names: list[str]) -> None:
        """Take requests back."""
        self._wait(self._client.abort(names))

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has more to give."""
        return self._running > 0

    def step(self) -> list[Any]:
        """What has arrived, at least one output or the end of a request."""
        arrived = [self._outputs.get(timeout=_SECONDS)]
        while not self._outputs.empty():
            arrived.append(self._outputs.get())
        self._running -= arrived.count(None)
        return [each for each in arrived if each is not None]

    def reset_prefix_cache(self) -> bool:
        """Forget what is cached, in each engine."""
        return bool(self._wait(self._client.reset_prefix_cache()))

    def collective_rpc(self, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        """The answers of all workers of all engines."""
        return self._wait(self._engines.ask(method, *args))

    def close(self) -> None:
        """End the engines' processes."""
        self._client.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SECONDS)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_SECONDS)


async def _client(model: str, arguments: dict[str, Any]) -> Any:
    # Its tasks belong to the loop that runs here.
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(model, data_parallel_size=2, **arguments))
