"""What is said of all tensors of some steps at once is what is true of each."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcore.hotpath import copying
from tlcore_backends.safetensors.blocks import Block
from tlcore_backends.safetensors.columns import Chunk, Column
from tlcore_backends.safetensors.sealed import put_together
from tlcore_backends.safetensors.shard_buffer import ShardBuffers

MEMORY = np.arange(8192, dtype=np.uint32).view(np.uint8)
Table = list[list[int]]


def drawn(tensors: int, steps: int, least: int, most: int) -> st.SearchStrategy[Table]:
    row = st.lists(st.integers(least, most), min_size=steps, max_size=steps)
    return st.lists(row, min_size=tensors, max_size=tensors)


@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_each_tensor_is_what_its_steps_are(data: st.DataObject, tensors: int, steps: int) -> None:
    rows = data.draw(drawn(tensors, steps, 0, 3))
    kinds = data.draw(drawn(tensors, steps, 0, 1))
    width = data.draw(st.sampled_from([1, 700, 2048]))
    sizes = np.array(rows) * width
    places = np.array(data.draw(drawn(tensors, steps, 0, MEMORY.nbytes - 3 * width)))
    if data.draw(st.booleans()):
        places = places[:, :1] + np.cumsum(sizes, 1) - sizes
        places -= np.maximum(places[:, -1:] + sizes[:, -1:] - MEMORY.nbytes, 0)
    hashes = np.array(kinds, np.uint8)[:, :, None].repeat(16, 2).reshape(tensors, -1).view("V16")
    block = Block([MEMORY] * tensors, places, sizes, np.array(rows), hashes)
    for tensor in range(tensors):
        parts = [
            bytes(MEMORY[begin : begin + size])
            for begin, size in zip(places[tensor], sizes[tensor], strict=True)
        ]
        is_constant = len(set(kinds[tensor])) == len(set(rows[tensor])) == 1
        assert block.is_constant[tensor] == is_constant
        assert block.hashes(tensor) == b"".join(bytes([kind]) * 16 for kind in kinds[tensor])
        assert np.frombuffer(block.row_text(tensor), np.int64).tolist() == rows[tensor]
        for count in (1, steps):
            expected = b"".join(parts[:count])
            assert b"".join(block.pieces(tensor, count)) == expected
            target = bytearray(len(expected))
            copying.copy_from(target, *block.addresses([tensor], count))
            assert target == expected
        assert len(block.pieces(tensor, steps)) <= block.count(tensor, steps)
        assert block.nbytes[tensor] == len(b"".join(parts)) and block.rows[tensor] == sum(rows[tensor])


@pytest.mark.parametrize("apart", [False, True], ids=["one block", "two blocks"])
@pytest.mark.parametrize("last", [1, 2], ids=["the same", "other"])
def test_a_column_is_constant_over_all_its_blocks(last: int, apart: bool) -> None:
    hashes = np.array([[1, 1, last]], np.uint8).repeat(16, 1).view("V16")
    places, sizes, rows = np.array([[0, 8, 16]]), np.full((1, 3), 8), np.full((1, 3), 2)
    spans = [slice(0, 2), slice(2, 3)] if apart else [slice(0, 3)]
    blocks = [
        Block([MEMORY], places[:, span], sizes[:, span], rows[:, span], hashes[:, span]) for span in spans
    ]
    column = Column(slot=None, chunks=[Chunk(block, 0) for block in blocks])  # type: ignore[arg-type]
    column.settle()
    assert column.times == 3
    assert column.constant == (last == 1)
    assert (column.stored_rows, column.stored_bytes) == ((2, 8) if last == 1 else (6, 24))
    pieces = [piece for block, *which in column.stored() for piece in block.pieces(*which)]
    assert b"".join(pieces) == bytes(MEMORY[: column.stored_bytes])


@given(st.data(), st.lists(st.booleans(), min_size=4, max_size=4))
def test_where_a_file_lies_is_where_its_buffers_are(data: st.DataObject, apart: list[bool]) -> None:
    columns = []
    for tensors, steps in ((3, 4), (1, 1)):
        sizes = np.array(data.draw(drawn(tensors, steps, 0, 40)))
        places = np.array(data.draw(drawn(tensors, steps, 0, MEMORY.nbytes - 40)))
        hashes = np.array(data.draw(drawn(tensors, steps, 0, 1)), np.uint8)[:, :, None].repeat(16, 2)
        hashes = hashes.reshape(tensors, -1).view("V16")
        block = Block([MEMORY] * tensors, places, sizes, sizes, hashes)
        for tensor in range(tensors):
            columns.append(Column(slot=None, chunks=[Chunk(block, tensor)]))  # type: ignore[arg-type]
    for column in columns:
        column.settle()
    parts, memory = put_together(ShardBuffers(), b"the head", columns, apart)
    addresses, sizes, held = parts.places()
    found = bytearray(sizes.sum())
    copying.copy_from(found, addresses, sizes)
    assert found == b"".join(parts) and found.startswith(b"the head") and not memory
    stored = [
        piece for column in columns for block, *which in column.stored() for piece in block.pieces(*which)
    ]
    assert found[8:] == b"".join(stored)
    still_read = pickle.PickleBuffer(parts[0])
    assert not parts.end()
    del still_read
    # Whoever has the addresses has the memory.
    assert isinstance(held, tuple) and held[1].tobytes().startswith(b"the head")
    with pytest.raises(ValueError, match="released"):
        bytes(parts._whole)
    with pytest.raises(ValueError, match="released"):
        parts.places()
    with pytest.raises(ValueError, match="given back"):
        list(parts)


@pytest.mark.parametrize("half", ["C", "Python"])
def test_what_is_copied_fills_the_memory_exactly(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if half == "Python":
        monkeypatch.setattr(copying, "extension", None)
    base = MEMORY.ctypes.data
    target = bytearray(7)
    copying.copy_from(target, np.array([base + 4, base, base]), np.array([4, 0, 3]))
    assert target == bytes(MEMORY[4:8]) + bytes(MEMORY[:3])
    for sizes in ([4, 4], [4], [8, -1], [3, 3]):
        with pytest.raises(ValueError, match="do not fill the memory exactly"):
            copying.copy_from(target, np.array([base, base]), np.array(sizes))
    assert target == bytes(MEMORY[4:8]) + bytes(MEMORY[:3])
    copying.copy_from(bytearray(), np.array([], np.int64), np.array([], np.int64))
