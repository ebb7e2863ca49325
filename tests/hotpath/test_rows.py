"""Rows of many files read to their places in one call: both halves do the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hotpath.halves import half_of, native
from tlcore.hotpath import rows

TWINS: dict[str, Callable[..., Any]] = {"read_rows": rows._read_rows}
half = half_of(TWINS)
Half = Callable[[str], Callable[..., Any]]
HEAD = b"head"
NAMES = ["a/one", "other", "hard", "soft", "way/one", "pipe", "missing", "../secret", "a", "long", "odd"]


@pytest.fixture(scope="module")
def there() -> Iterator[Path]:
    """Files of a head and four rows of three bytes, and what is none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        (folder / "a").mkdir(parents=True)
        (folder / "a" / "one").write_bytes(HEAD + b"aaabbbcccddd")
        (folder / "other").write_bytes(HEAD + b"AAABBBCCCDDD")
        (folder / "long").write_bytes(HEAD + b"AAABBBCCCDDDE")
        (folder / "odd").write_bytes(b"heat" + b"AAABBBCCCDDD")
        os.link(folder / "a" / "one", folder / "hard")
        (folder / "soft").symlink_to("other")
        (folder / "way").symlink_to("a")
        os.mkfifo(folder / "pipe")
        (Path(name) / "secret").write_bytes(HEAD + b"aaabbbcccddd")
        yield folder


def packed(*pieces: tuple[int, int, int, int]) -> Any:
    return np.array(pieces, np.int64).reshape(-1, 4)


def matrix(count: int, width: int, apart: int) -> Any:
    """Rows that have others' bytes between them, and all of it."""
    whole = np.full((count, width + apart), ord("."), np.uint8)
    return whole[:, :width], whole


@pytest.mark.parametrize("apart", [0, 2])
def test_rows_go_where_they_belong(half: Half, there: Path, apart: int) -> None:
    target, whole = matrix(6, 3, apart)
    pieces = packed((0, 1, 4, 2), (1, 0, 0, 1), (1, 3, 1, 1), (1, 1, 2, 2))
    read = half("read_rows")(str(there), ["a/one", "other"], 16, HEAD, pieces, target)
    assert read == b"\1\1"
    between = b"." * apart
    expected = [b"AAA", b"DDD", b"BBB", b"CCC", b"bbb", b"ccc"]
    assert whole.tobytes() == b"".join(row + between for row in expected)


def test_what_is_no_such_file_is_told_and_others_are_read(half: Half, there: Path) -> None:
    target, _ = matrix(len(NAMES), 3, 0)
    pieces = packed(*((number, 2, number, 1) for number in range(len(NAMES))))
    read = half("read_rows")(str(there), NAMES, 16, HEAD, pieces, target)
    assert [name for name, done in zip(NAMES, read, strict=True) if done] == ["a/one", "other", "hard"]
    assert target[:3].tobytes() == b"cccCCCccc" and target[3:].tobytes() == b"." * 3 * (len(NAMES) - 3)
    # One of which nothing is wanted is not looked at.
    assert (
        half("read_rows")(str(there), ["a/one", "other"], 16, HEAD, packed((1, 0, 0, 1)), target) == b"\0\1"
    )
    assert half("read_rows")(str(there / "none"), ["a/one"], 16, HEAD, packed((0, 0, 0, 1)), target) == b"\0"


@pytest.mark.parametrize("apart", [0, 1])
def test_many_rows_are_read_whole(half: Half, tmp_path: Path, apart: int) -> None:
    # More pieces of memory than the system takes at a time.
    data = np.frombuffer(os.urandom(3000 * 7), np.uint8).reshape(3000, 7)
    (tmp_path / "file").write_bytes(HEAD + data.tobytes())
    order = np.random.default_rng(0).permutation(3000)
    target, _ = matrix(3000, 7, apart)
    pieces = np.stack((np.zeros(3000, np.int64), order, np.arange(3000), np.ones(3000, np.int64)), axis=1)
    assert half("read_rows")(str(tmp_path), ["file"], 21_004, HEAD, pieces, target) == b"\1"
    assert (target == data[order]).all()
    assert half("read_rows")(str(tmp_path), ["file"], 21_004, HEAD, packed((0, 0, 0, 3000)), target) == b"\1"
    assert (target == data).all()


@pytest.mark.parametrize(
    "piece",
    [(0, 0, 0, 5), (0, 4, 0, 1), (0, -1, 0, 1), (0, 0, 5, 2), (0, 0, -1, 1), (1, 0, 0, 1), (-1, 0, 0, 1),
     (0, 0, 0, -1), (0, 2**63 - 1, 0, 1), (0, 0, 2**63 - 1, 1), (0, 0, 0, 2**63 - 1)],
)  # fmt: skip
def test_pieces_that_do_not_fit_are_refused(half: Half, there: Path, piece: Any) -> None:
    target, _ = matrix(6, 3, 0)
    with pytest.raises(ValueError, match="piece 1: "):
        half("read_rows")(str(there), ["a/one"], 16, HEAD, packed((0, 0, 0, 1), piece), target)
    assert target.tobytes() == b"." * 18


def test_other_memory_than_a_matrix_of_bytes_is_refused(half: Half, there: Path) -> None:
    first = packed((0, 0, 0, 1))

    def read(target: Any, size: int = 16, pieces: Any = first) -> Any:
        return half("read_rows")(str(there), ["a/one"], size, HEAD, pieces, target)

    fine = np.zeros((4, 6), np.uint8)
    for wrong in (fine[:, ::2], fine[0], fine.view(np.int16), fine.T):
        with pytest.raises(ValueError, match="matrix of bytes"):
            read(wrong)
    for size, pieces in ((3, packed()), (16, np.zeros(3, np.int64))):
        with pytest.raises(ValueError, match="as long as their head"):
            read(fine, size, pieces)
    fine.flags.writeable = False
    with pytest.raises(ValueError, match=r"read-only|writable"):
        read(fine)


@settings(max_examples=80)
@given(st.data())
def test_both_halves_read_the_same(there: Path, data: st.DataObject) -> None:
    number = st.integers(0, 4) | st.integers(-2, 9) | st.sampled_from([2**63 - 1, -(2**63)])
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
    fits = st.tuples(st.integers(0, len(names) - 1), st.integers(0, 2), st.integers(0, 3), st.integers(0, 2))
    pieces = sorted(data.draw(st.lists(fits | st.tuples(number, number, number, number), max_size=5)))
    size, width = data.draw(st.just(16) | st.integers(0, 20)), data.draw(st.just(3) | st.integers(0, 5))
    apart = data.draw(st.integers(0, 2))
    found = []
    for function in (native().read_rows, TWINS["read_rows"]):
        target, whole = matrix(5, width, apart)
        try:
            found.append((function(str(there), names, size, HEAD, packed(*pieces), target), whole.tobytes()))
        except ValueError as error:
            found.append((str(error), whole.tobytes()))
    assert found[0] == found[1]
