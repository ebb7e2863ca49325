"""How much a run may still store."""

from __future__ import annotations

import threading


class RunBytes:
    """The bytes that a run may have: ``most`` of them, taken by whoever knows what is stored of a tensor.

    That is the model's thread when it copies one, or, where rows may still have to go, the pipeline's.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, most: int | None, later: bool) -> RunBytes | None:
        """Those of a limit; None without one.

        Nor are there any where it is known ``later`` which tensors are stored, when these are looked at, or
        none is, as where only statistics of channels are.
        """
        return None if most is None or later else cls(most)

    def take(self, nbytes: int) -> bool:
        """Whether a tensor of so many bytes is to be stored.

        Once one is not, none is: smaller ones that still fit would be a choice that nobody made.
        """
        with self._lock:
            fits = self._taken + nbytes <= self._most
            self._taken = self._taken + nbytes if fits else self._most
            return fits

    def give_back(self, nbytes: int) -> None:
        """A tensor that had its bytes could not be copied."""
        with self._lock:
            # Of a run that is full, nothing is free again.
            if self._taken < self._most:
                self._taken -= nbytes

    @property
    def full(self) -> bool:
        """Whether nothing more is stored."""
        return self._taken >= self._most
