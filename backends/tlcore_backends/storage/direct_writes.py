"""Which files are written past the system's page cache."""

from __future__ import annotations

# Less than this is quickly written either way, and may be read soon.
_DIRECT_BYTES = 4 << 20
# A disk that takes less a second is left to the cache, which takes a burst at the speed of memory.
_SLOWEST = 200e6


class DirectWrites:
    """From how many bytes on (``least``) one write in a place goes past the cache; -1 for never.

    New pages for a file's bytes cost several times what copying them does, where memory comes from a virtual
    machine's host, and what a capture writes is rarely read at once. One write that was slow, whatever the
    cause, ends it for the place.
    """

    def __init__(self) -> None:
        self.least = _DIRECT_BYTES

    def note(self, written: int, seconds: float) -> None:
        """So many bytes were written in this time."""
        if written >= _DIRECT_BYTES and seconds * _SLOWEST > written:
            self.end()

    def end(self) -> None:
        """Write nothing past the cache any more."""
        self.least = -1
