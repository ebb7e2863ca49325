"""The operators ``tlcore::tap`` and ``tlcore::side``: they show tensors where a compiled graph computed them.

A compiler may neither drop such an operator nor move it past another one, because each writes to the anchor
(so it says: the anchor's value never changes). Who receives the tensors is set from outside; without a
receiver the operator returns at once. ``tap`` shows one tensor, whose ``slot`` was planned before; ``side``
all of one side of a call, of a module that ``who`` names, and numbers that may differ from call to call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Receiver(Protocol):
    """Who takes what the taps show; must not raise, and must copy what it wants to keep."""

    def fire(self, slot: int, tensor: torch.Tensor) -> None:
        """Take a tensor of any device and strides; its memory is only lent."""
        ...


def _nobody() -> None:
    return None


class _Current(threading.local):
    # Weakly, since a receiver knows its model, and an engine that is forgotten must not stay in memory.
    receiver: Callable[[], Receiver | None] = staticmethod(_nobody)


_current = _Current()


def receive_with(receiver: Receiver | None) -> None:
    """Show what this thread's taps see to ``receiver`` from now on, or to nobody."""
    _current.receiver = _nobody if receiver is None else weakref.ref(receiver)


def _tap(x: torch.Tensor, anchor: torch.Tensor, slot: int) -> None:
    receiver = _current.receiver()
    if receiver is not None:
        receiver.fire(slot, x)


def _fake_tap(x: torch.Tensor, anchor: torch.Tensor, slot: int) -> None:
    """What a compiler sees instead: nothing."""


torch.library.define("tlcore::tap", "(Tensor x, Tensor(a!) anchor, int slot) -> ()")
torch.library.impl("tlcore::tap", "CompositeExplicitAutograd", _tap)
torch.library.register_fake("tlcore::tap", _fake_tap)

tap = torch.ops.tlcore.tap.default

# Takes what `side` shows; set by whoever lets sides be traced.
side_shown: Callable[[Sequence[torch.Tensor], int, int, Sequence[int]], None] | None = None


def _side(
    tensors: Sequence[torch.Tensor],
    anchor: torch.Tensor,
    who: torch.Tensor,
    slot: int,
    numbers: Sequence[int],
) -> None:
    if side_shown is not None:
        side_shown(tensors, int(who), slot, numbers)


def _fake_side(
    tensors: Sequence[torch.Tensor],
    anchor: torch.Tensor,
    who: torch.Tensor,
    slot: int,
    numbers: Sequence[int],
) -> None:
    """What a compiler sees instead: nothing."""


torch.library.define(
    "tlcore::side", "(Tensor[] tensors, Tensor(a!) anchor, Tensor who, int slot, SymInt[] numbers) -> ()"
)
torch.library.impl("tlcore::side", "CompositeExplicitAutograd", _side)
torch.library.register_fake("tlcore::side", _fake_side)

side = torch.ops.tlcore.side.default
