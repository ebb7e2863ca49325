"""A response whose body goes out as its client takes it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import Response

_PIECE_BYTES = 256 << 10
# A client that does not take a piece for so long is given up: what it does not take stays in memory.
STALLED_S = 60.0

log = logging.getLogger("tlcore")


class PacedResponse(Response):
    """As any response, but for memory: a server takes all that it is given and keeps what it cannot send yet.

    So it is given piece by piece, and the body, and what is ``held`` for it, are there until nearly all is
    sent, or the client has left or takes nothing any more.
    """

    held: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        tasks = [asyncio.ensure_future(self._send(send)), asyncio.ensure_future(left(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done() and not tasks[0].result():
                # The server closes the connection, as the response is not complete.
                log.warning("a client has not gone on taking its request's tensors for %g s", STALLED_S)
        finally:
            for each in tasks:
                each.cancel()
            # Of one that failed while the client left, nobody need be told.
            await asyncio.gather(*tasks, return_exceptions=True)
            # A task that has failed is in a circle with this function.
            tasks.clear()
            self.body, self.held = b"", None

    async def _send(self, send: Any) -> bool:
        """Whether the client has taken all but a little."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        whole = memoryview(self.body)
        for begin in range(0, len(whole), _PIECE_BYTES):
            piece = bytes(whole[begin : begin + _PIECE_BYTES])
            message = {"type": "http.response.body", "body": piece, "more_body": True}
            sending = asyncio.ensure_future(send(message))
            try:
                done, _ = await asyncio.wait({sending}, timeout=STALLED_S)
            finally:
                # Nobody else would.
                sending.cancel()
            if not done:
                return False
            sending.result()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


async def left(receive: Any) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
