"""The tensors of a segment's steps as tables: what is said of each is found out for all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tlcore.layout.hashes import HASH_BYTES

from .described import Slot
from .plans import Plan

ROWS_BYTES = 8
# Each piece that is written by itself costs about as much as copying so many bytes.
_LARGE_PIECE = 2 << 10


class Block:
    """Tensors of steps that differ in bytes and rows alone.

    Each has ``data``, memory in which its bytes in each step begin at ``places``; ``sizes`` is how many they
    are, ``rows`` what the step adds to its array, all ``[tensors, steps]``. ``hashes`` are ``[tensors,
    steps, 16]``.
    """

    def __init__(
        self,
        data: Sequence[np.ndarray],
        places: np.ndarray,
        sizes: np.ndarray,
        rows: np.ndarray,
        hashes: np.ndarray,
    ) -> None:
        self._data = data
        self._places = places
        self._sizes = sizes
        self.steps = places.shape[1]
        self.nbytes: list[int] = sizes.sum(1).tolist()
        self.rows: list[int] = rows.sum(1).tolist()
        self.first_nbytes: list[int] = sizes[:, 0].tolist()
        self.first_rows: list[int] = rows[:, 0].tolist()
        self._row_texts = np.ascontiguousarray(rows).tobytes()
        self._hashes = np.ascontiguousarray(hashes).tobytes()
        same = (hashes[:, 1:] == hashes[:, :1]).all(1) & (rows[:, 1:] == rows[:, :1]).all(1)
        # Whether a tensor is the same in every step.
        self.is_constant: list[bool] = same.tolist()
        in_one_piece = (places[:, 1:] == places[:, :-1] + sizes[:, :-1]).all(1)
        self._in_one_piece: list[bool] = in_one_piece.tolist()
        self._is_large: list[bool] = (in_one_piece | (sizes >= _LARGE_PIECE).all(1)).tolist()

    @classmethod
    def of_steps(
        cls, memory: np.ndarray, begins: Sequence[int], plans: Sequence[Plan], hashes: Sequence[bytes]
    ) -> Block:
        """That of steps whose bytes begin so in ``memory`` and whose plans have the same base."""
        count, width = len(plans), len(plans[0].slots)
        tables = np.stack([plan.table for plan in plans])
        places, sizes, rows = np.ascontiguousarray(tables.transpose(1, 2, 0))
        places += np.array(begins, np.int64)
        table = np.frombuffer(b"".join(hashes), f"V{HASH_BYTES}").reshape(count, width)
        return cls([memory] * width, places, sizes, rows, table.T)

    @classmethod
    def of_slots(
        cls, slots: Sequence[Slot], data: Sequence[np.ndarray], places: Sequence[int], hashes: bytes
    ) -> Block:
        """That of tensors of one step, each in its ``data`` at a place of its own."""
        rows = np.array([[slot.rows] for slot in slots], np.int64).reshape(-1, 1)
        sizes = np.array([[slot.nbytes] for slot in slots], np.int64).reshape(-1, 1)
        begins = np.array(places, np.int64).reshape(-1, 1)
        return cls(data, begins, sizes, rows, np.frombuffer(hashes, f"V{HASH_BYTES}").reshape(-1, 1))

    def hashes(self, tensor: int) -> bytes:
        """The hashes of a tensor, step by step."""
        return _row(self._hashes, tensor, HASH_BYTES * self.steps)

    def row_text(self, tensor: int) -> bytes:
        """What each step adds to a tensor's array, 64 bits each."""
        return _row(self._row_texts, tensor, ROWS_BYTES * self.steps)

    def is_large(self, tensor: int) -> bool:
        """Whether writing a tensor's bytes from where they lie takes less than putting them together."""
        return self._is_large[tensor]

    def count(self, tensor: int, steps: int) -> int:
        """In how many pieces a tensor's bytes in the first ``steps`` lie."""
        return 1 if self._in_one_piece[tensor] else steps

    def addresses(self, tensors: Sequence[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in memory the bytes of tensors in the first ``steps`` lie, and how many: one by one."""
        memory = np.array([self._data[tensor].ctypes.data for tensor in tensors], np.int64)
        places = self._places[tensors, :steps] + memory[:, None]
        return places.reshape(-1), self._sizes[tensors, :steps].reshape(-1)

    def pieces(self, tensor: int, steps: int) -> list[memoryview]:
        """A tensor's bytes in the first ``steps``, in order, where they lie."""
        flat, places, sizes = (
            self._data[tensor].data,
            self._places[tensor, :steps],
            self._sizes[tensor, :steps],
        )
        if self._in_one_piece[tensor]:
            begin = int(places[0])
            spans = [(begin, begin + int(sizes.sum()))]
        else:
            spans = list(zip(places.tolist(), (places + sizes).tolist(), strict=True))
        return [flat[begin:end] for begin, end in spans if begin < end]


def _row(table: bytes, row: int, width: int) -> bytes:
    return table[row * width : (row + 1) * width]
