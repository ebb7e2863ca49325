"""Many files read to one place, checked and made in one call each: both halves do the same."""

from __future__ import annotations

import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hotpath.halves import half_of, native
from tlcore.hotpath import beneath, gathering, making, moving, reading, seals
from tlcore.hotpath.seals import Seal, mix

TWINS: dict[str, Callable[..., Any]] = {
    "gather_payloads": gathering._gather_payloads,
    "move_payloads": moving._move_payloads,
    "gather_ranges": reading._gather_ranges,
    "count_entries": beneath._count_entries,
    "make_files": making._make_files,
    "seal": seals._seal,
    "are_sealed": seals._are_sealed,
}
half = half_of(TWINS)
Half = Callable[[str], Callable[..., Any]]


def packed(rows: Any) -> bytes:
    flat = [number for row in rows for number in row]
    return struct.pack(f"={len(flat)}q", *flat)


def outcomes(name: str, *args: Any) -> Iterator[Any]:
    """What each half returns or raises, and what it writes; a number stands for so much memory."""
    for function in (getattr(native(), name), TWINS[name]):
        given = [bytearray(b"?" * each) if isinstance(each, int) else each for each in args]
        try:
            yield function(*given), given
        except (ValueError, TypeError, OSError) as error:
            yield type(error).__name__, str(error)


@pytest.fixture(scope="module")
def there() -> Iterator[Path]:
    """Files, hard links, and what must not be followed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        (folder / "a").mkdir(parents=True)
        (folder / "a" / "one").write_bytes(b"headpayloadtail")
        (folder / "other").write_bytes(b"HEADPAYLOADTAIL")
        (folder / "empty").touch()
        os.link(folder / "a" / "one", folder / "hard")
        (folder / "soft").symlink_to("other")
        (folder / "way").symlink_to("a")
        os.mkfifo(folder / "pipe")
        (Path(name) / "secret").write_bytes(b"headpayloadtail")
        yield folder


NAMES = ["a/one", "other", "hard", "soft", "way/one", "pipe", "missing", "../secret", "a", "empty"]


def test_payloads_go_where_they_belong(half: Half, there: Path) -> None:
    names = ["a/one", "hard", "other", "hard", "soft", "../secret"]
    spans = [(15, 4, 11, 7), (15, 4, 11, -1), (15, 4, 11, 0), (15, 4, 11, 14), (15, 4, 11, 0), (15, 4, 11, 0)]
    kept, target = bytearray(b"?" * 48), bytearray(21)
    first, digests = half("gather_payloads")(str(there), names, packed(spans), kept, target)
    # What goes somewhere is read, what goes nowhere only where no hard link of it was.
    assert struct.unpack("=6q", first) == (0, 0, 2, 3, -1, -1)
    assert target == b"PAYLOADpayloadpayload"
    assert kept == b"headtail" + b"?" * 8 + b"HEADTAIL" + b"headtail" + b"?" * 16
    own = xxhash.xxh3_128_digest(b"payload")
    assert digests == own * 2 + xxhash.xxh3_128_digest(b"PAYLOAD") + own + bytes(32)


def test_no_memory_is_taken_for_what_is_not_there(half: Half, there: Path) -> None:
    spans = [(2**63 - 1, 0, 2**63 - 1, -1), (15, 4, 11, -1)]
    first, _ = half("gather_payloads")(
        str(there), ["other", "other"], packed(spans), bytearray(8), bytearray()
    )
    assert struct.unpack("=2q", first) == (-1, 1)


@settings(max_examples=80)
@given(st.data())
def test_both_halves_gather_the_same(there: Path, data: st.DataObject) -> None:
    number = st.integers(-2, 16) | st.sampled_from([2**63 - 1, -(2**63)])
    likely = st.just((15, 4, 11)) | st.just((0, 0, 0)) | st.tuples(number, number, number)
    chosen = data.draw(st.lists(st.tuples(st.sampled_from(NAMES), likely, number | st.just(-1)), max_size=8))
    names, spans = [name for name, _, _ in chosen], [(*span, at) for _, span, at in chosen]
    rooms = data.draw(st.integers(0, 200)), data.draw(st.integers(0, 60))
    one, other = outcomes("gather_payloads", str(there), names, packed(spans), *rooms)
    # A file that cannot be read to its end may leave some of it.
    assert one == other


@pytest.mark.parametrize("room", [1, 3, 7, 100])
def test_payloads_are_moved_to_their_places(half: Half, there: Path, tmp_path: Path, room: int) -> None:
    names = ["a/one", "hard", "other", "empty", "hard", "other", "soft", "other"]
    places = [20, 2, 9, 16, -1, 27, 0, 40]
    spans = [(15, 4, 11, at) for at in places]
    spans[3] = (0, 0, 0, 16)
    kept, target = bytearray(b"?" * 64), tmp_path / "target"
    with target.open("wb") as file:
        digests = half("move_payloads")(
            str(there), names, packed(spans), kept, bytearray(room), file.fileno()
        )
    own, other = xxhash.xxh3_128_digest(b"payload"), xxhash.xxh3_128_digest(b"PAYLOAD")
    # Up to the first that is not reached, and nothing of those behind it.
    assert digests == own + own + other + xxhash.xxh3_128_digest(b"") + own + other
    assert target.read_bytes() == b"\0\0payloadPAYLOAD\0\0\0\0payloadPAYLOAD"
    assert kept == b"headtail" * 2 + b"HEADTAIL" + b"headtail" + b"HEADTAIL" + b"?" * 24


def test_what_cannot_be_written_is_told(half: Half, there: Path) -> None:
    with (there / "empty").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        half("move_payloads")(
            str(there), ["other"], packed([(15, 4, 11, 0)]), bytearray(8), bytearray(8), file.fileno()
        )


@settings(max_examples=80)
@given(st.data())
def test_both_halves_move_the_same(there: Path, data: st.DataObject) -> None:
    number = st.integers(-2, 16) | st.sampled_from([2**63 - 1, -(2**63)])
    likely = st.just((15, 4, 11)) | st.just((0, 0, 0)) | st.tuples(number, number, number)
    chosen = data.draw(st.lists(st.tuples(st.sampled_from(NAMES), likely, number | st.just(-1)), max_size=8))
    names, spans = [name for name, _, _ in chosen], [(*span, at) for _, span, at in chosen]
    rooms = data.draw(st.integers(0, 200)), data.draw(st.integers(0, 20))
    found = []
    for function in (native().move_payloads, TWINS["move_payloads"]):
        kept, room = (bytearray(b"?" * each) for each in rooms)
        with (there.parent / "target").open("w+b") as file:
            try:
                told: Any = function(str(there), names, packed(spans), kept, room, file.fileno())
            except (ValueError, OSError) as error:
                told = type(error).__name__, str(error)
            found.append((told, bytes(kept), file.read()))
    assert found[0] == found[1]


def test_large_parts_are_moved_whole(half: Half, tmp_path: Path) -> None:
    # Larger, together and each, than what one call of the system is given.
    head, data, tail = (os.urandom(size) for size in (300_001, 1_000_003, 262_144))
    rows = [(0, len(head), 0, len(data), len(head), len(head + tail), -1), (5, 5, 7, 9, 0, 0, -1)]
    half("make_files")(str(tmp_path), ["f"], ["f/one", "two"], packed(rows), head + tail, data)
    assert (tmp_path / "f" / "one").read_bytes() == head + data + tail
    assert (tmp_path / "two").read_bytes() == data[7:9]
    size = len(head + data + tail)
    kept, target = bytearray(len(head + tail)), bytearray(len(data))
    span = packed([(size, len(head), len(head + data), 0)])
    first, digests = half("gather_payloads")(str(tmp_path), ["f/one"], span, kept, target)
    assert struct.unpack("=q", first) == (0,) and digests == xxhash.xxh3_128_digest(data)
    assert kept == head + tail and target == data


@settings(max_examples=80)
@given(st.lists(st.tuples(*[st.integers(-2, 17) | st.sampled_from([2**63 - 1, -(2**63)])] * 3), max_size=6))
def test_both_halves_gather_ranges_alike(there: Path, ranges: list[tuple[int, int, int]]) -> None:
    found: list[Any] = []
    for function in (native().gather_ranges, TWINS["gather_ranges"]):
        target = bytearray(b"?" * 12)
        with (there / "other").open("rb") as file:
            try:
                found.append((function(file.fileno(), packed(ranges), target), target))
            except ValueError as error:
                found.append((str(error), target))
    assert found[0] == found[1]


def test_ranges_go_where_they_belong_up_to_one_that_is_not_there(half: Half, there: Path) -> None:
    target = bytearray(12)
    with (there / "other").open("rb") as file:
        ranges = packed([(4, 11, 5), (0, 4, -1), (11, 15, 0), (12, 16, 0), (0, 4, 0)])
        digests = half("gather_ranges")(file.fileno(), ranges, target)
    # The range that ends too late leaves what there was of it.
    assert target[:4] == b"AILL" and target[5:] == b"PAYLOAD"
    assert digests == b"".join(xxhash.xxh3_128_digest(part) for part in (b"PAYLOAD", b"HEAD", b"TAIL"))


def test_entries_are_counted(half: Half, there: Path) -> None:
    count = half("count_entries")
    assert count(str(there), ["a"]) == 1
    assert count(str(there.parent), ["run", "run/a"]) == 7 + 1
    assert count(str(there), []) == 0
    for missing in ("way", "nowhere", "../run", "other", "a/..", ""):
        assert count(str(there), ["a", missing]) == -1, missing
    assert count(str(there / "nowhere"), ["a"]) == -1


TEMPLATE = b"head" + b"." * 4 + b"id" + b"0" * 20 + b"." * 8
SEAL = Seal(of_data=(4, 32), mixed=5, last=7, digits=10, begin=8, end=30, of_range=(36,))


def sealed(data: bytes) -> bytes:
    """What the template becomes, by its description."""
    mixed = mix(5, zlib.crc32(data)) if data else 5
    identity = b"id%020d" % mix(mixed, 7)
    checksum = struct.pack("<I", zlib.crc32(data))
    return b"head" + checksum + identity + b".." + checksum + struct.pack("<I", zlib.crc32(identity))


def test_checksums_are_filled_in_and_found(half: Half) -> None:
    template = TEMPLATE + b"...."
    data, texts = b"some data", bytearray(120)
    spans = ((0, 0, 9), (40, 0, 4), (80, 3, 3))
    rows = b"".join(SEAL.row(40, 2, at, begin, end) for at, begin, end in spans)
    half("seal")(texts, b"xx" + template, rows, data)
    assert texts == b"".join(sealed(data[begin:end])[:40].ljust(40, b".") for _, begin, end in spans)
    sizes = b"".join(SEAL.row(40, 2, at, 0, end - begin) for at, begin, end in spans)
    assert half("are_sealed")(texts, b"xx" + template, sizes) is True
    for place in range(len(texts)):
        wrong = bytearray(texts)
        wrong[place] ^= 1
        assert half("are_sealed")(wrong, b"xx" + template, sizes) is False, place


@settings(max_examples=200)
@given(st.data())
def test_both_halves_refuse_the_same_seals(data: st.DataObject) -> None:
    number = st.integers(-2, 50) | st.sampled_from([2**63 - 1, -(2**63)])
    values = list(struct.unpack("=5q3qQQ3q3q", SEAL.row(40, 0, 3, 1, 5)))
    for place in data.draw(st.lists(st.integers(0, len(values) - 1), max_size=3)):
        values[place] = data.draw(number if place not in (8, 9) else st.integers(0, 2**64 - 1))
    row = struct.pack("=5q3qQQ3q3q", *values)[: data.draw(st.just(None) | st.integers(0, 127))]
    one, other = outcomes("seal", 50, TEMPLATE + b"....", row, b"some data")
    assert one == other
    one, other = outcomes("are_sealed", b"a" * 50, TEMPLATE + b"....", row)
    assert one == other


def test_files_are_made_of_parts_and_links(half: Half, tmp_path: Path) -> None:
    os.umask(mask := os.umask(0o022))
    rows = packed([(0, 4, 0, 3, 4, 8, -1), (0, 0, 0, 0, 0, 0, 0), (8, 9, 0, 0, 0, 0, -1)])
    half("make_files")(str(tmp_path), ["a", "b"], ["a/one", "b/two", "three"], rows, b"headtail!", b"mid")
    assert (tmp_path / "a" / "one").read_bytes() == (tmp_path / "b" / "two").read_bytes() == b"headmidtail"
    assert (tmp_path / "three").read_bytes() == b"!"
    assert os.path.samefile(tmp_path / "a" / "one", tmp_path / "b" / "two")
    assert stat.S_IMODE((tmp_path / "three").stat().st_mode) == 0o600 & ~mask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700 & ~mask
    with pytest.raises(FileExistsError) as caught:
        half("make_files")(str(tmp_path), [], ["three"], packed([(0,) * 6 + (-1,)]), b"", b"")
    assert caught.value.filename == "three"
    (tmp_path / "soft").symlink_to("elsewhere")
    with pytest.raises(OSError, match="soft"):
        half("make_files")(str(tmp_path), [], ["soft"], packed([(0,) * 6 + (-1,)]), b"", b"")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["", "/tmp/x", "../x", "a/../x", "."])
def test_no_file_is_made_elsewhere(half: Half, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    with pytest.raises(OSError, match="Invalid argument"):
        half("make_files")(str(folder), [], [name], packed([(0,) * 6 + (-1,)]), b"", b"")
    with pytest.raises(OSError, match="Invalid argument"):
        half("make_files")(str(folder), [name], [], b"", b"", b"")
    assert [*tmp_path.iterdir()] == [folder] and not [*folder.iterdir()]
    with pytest.raises(FileNotFoundError):
        half("make_files")(str(folder / "nowhere"), [], ["x"], packed([(0,) * 6 + (-1,)]), b"", b"")


@settings(max_examples=80)
@given(st.lists(st.tuples(*[st.integers(-1, 6) | st.just(0)] * 6, st.integers(-2, 3)), max_size=4))
def test_both_halves_make_the_same_files(rows: list[tuple[int, ...]]) -> None:
    found = []
    for function in (native().make_files, TWINS["make_files"]):
        with tempfile.TemporaryDirectory() as folder:
            names = [f"f{number}" for number in range(len(rows))]
            try:
                function(folder, [], names, packed(rows), b"texts", b"data")
                said = ""
            except ValueError as error:
                said = str(error)
            content = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            same = {path.name: path.stat().st_nlink for path in Path(folder).iterdir()}
            found.append((said, content, same))
    assert found[0] == found[1]
