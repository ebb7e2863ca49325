"""Copies made inside CUDA graphs: static buffers that each replay fills again, read after the replay.

Nothing of Python runs in a replay. So a tap that is recorded into a graph records two operations: a copy into
a buffer that stays where it is, and one more on a counter, by which the host sees later that the graph ran.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ....engine.staging.accelerator import accelerator_of

# Taps in all graphs together; vLLM records a graph for each of some fifty batch sizes.
_MOST_COPIES = 1 << 17


class StaticCopies:
    """The copies of one model on one device. ``device`` is where its tensors lie.

    A buffer is shared by the graphs of all batch sizes, since only one of them runs in a step.
    """

    def __init__(self, device: torch.device) -> None:
        # Made here, since memory that is zeroed while a graph is recorded is zeroed again by each replay.
        self._counters = torch.zeros(
            _MOST_COPIES if accelerator_of(device.type) is not None else 1024,
            dtype=torch.int64,
            device=device,
        )
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}
        self._copies: list[tuple[int, int, torch.Tensor]] = []
        self._passed: dict[int, int] = {}
        self._before: list[int] = []

    def begin_pass(self) -> None:
        """A forward pass begins: each slot's taps count from 0."""
        self._passed.clear()

    def record(self, slot: int, tensor: torch.Tensor) -> None:
        """Copy ``tensor`` now, and again whenever the graph that is being recorded is replayed.

        Raises RuntimeError when there are more taps than counters.
        """
        number = self._passed.get(slot, 0)
        self._passed[slot] = number + 1
        if len(self._copies) >= len(self._counters):
            raise RuntimeError(f"more than {len(self._counters)} taps in CUDA graphs")
        buffer = self._buffers.get((slot, number))
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            self._buffers[slot, number] = buffer
        view = buffer[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        self._counters[len(self._copies)].add_(1)
        self._copies.append((slot, number, view))

    def begin_step(self) -> None:
        """Note how often each graph has run until now."""
        self._before = self._counts()

    def replayed(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Slot and copy of each tap that was replayed once in the step, in the order of its firing.

        A tap replayed more than once has lost a tensor, and is left out.
        """
        counts = self._counts()
        runs: dict[tuple[int, int], list[torch.Tensor]] = {}
        for (slot, number, view), before, after in zip(self._copies, self._before, counts, strict=False):
            runs.setdefault((slot, number), []).extend([view] * (after - before))
        for (slot, _), views in sorted(runs.items()):
            if len(views) == 1:
                yield slot, views[0]

    def _counts(self) -> list[int]:
        return self._counters[: len(self._copies)].tolist() if self._copies else []
