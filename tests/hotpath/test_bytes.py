"""Hashing, copying, writing and reading many pieces: the C half and the Python half do the same."""

from __future__ import annotations

import fcntl
import itertools
import os
import resource
import signal
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import scaled
from tests.hotpath.halves import half_of, native
from tlcore.hotpath import copying, hashing, reading

TWINS: dict[str, Callable[..., Any]] = {
    "hex_digests": hashing._hex_digests,
    "gather": copying._gather,
    "write_all": copying._write_all,
    "read_files": reading._read_files,
    "hash_ranges": reading._hash_ranges,
    "identities": reading._identities,
}


half = half_of(TWINS)
_RANDOM = os.urandom(300_000 + 5000)
Half = Callable[[str], Callable[..., Any]]


def both(name: str, *args: Any) -> list[tuple[str, Any]]:
    """What each half returns or raises."""
    found: list[tuple[str, Any]] = []
    for function in (getattr(native(), name), TWINS[name]):
        try:
            found.append(("returned", function(*args)))
        except (ValueError, TypeError, OSError, BufferError) as error:
            found.append((type(error).__name__, None))
    return found


@given(st.lists(st.binary(max_size=2000), max_size=20))
def test_hashes_are_those_of_the_library(parts: list[bytes]) -> None:
    expected = [xxhash.xxh3_128_hexdigest(part) for part in parts]
    assert both("hex_digests", parts) == [("returned", expected)] * 2


@given(st.lists(st.tuples(st.integers(-5, 70), st.binary(max_size=40)), max_size=8), st.integers(0, 64))
def test_gathering_is_the_same_and_copies_nothing_when_it_refuses(
    pieces: list[tuple[int, bytes]], size: int
) -> None:
    targets = [bytearray(size), bytearray(size)]
    raised = []
    for function, target in zip((native().gather, TWINS["gather"]), targets, strict=True):
        try:
            function(target, [offset for offset, _ in pieces], [part for _, part in pieces])
            raised.append("")
        except ValueError as error:
            raised.append(str(error))
    assert targets[0] == targets[1] and raised[0] == raised[1]
    assert not raised[0] or targets[0] == bytearray(size)


@pytest.mark.parametrize("offset", [2**63, -(2**63) - 1, 2**200, -1, 1])
def test_hostile_offsets_are_refused(half: Half, offset: int) -> None:
    with pytest.raises(ValueError, match="offset of a part"):
        half("gather")(bytearray(8), [offset], [b"12345678"])


@pytest.mark.parametrize("size", [2**63, 2**200, -1, 65])
def test_hostile_sizes_of_files_are_refused(half: Half, size: int) -> None:
    with pytest.raises(ValueError, match="bytes of a file"):
        half("read_files")(bytearray(64), "/dev", ["null"], [size])


def test_what_is_no_memory_or_not_of_one_length_is_refused(half: Half) -> None:
    with pytest.raises(TypeError):
        half("hex_digests")([b"a", "text"])
    with pytest.raises(TypeError):
        half("gather")(b"12345678", [0], [b"1"])
    with pytest.raises(ValueError, match="as many"):
        half("gather")(bytearray(8), [], [b"1"])
    with pytest.raises(ValueError, match="as many"):
        half("read_files")(bytearray(8), "/", ["a"], [])


def test_writing_takes_any_number_of_parts_of_any_size(half: Half, tmp_path: Path) -> None:
    parts: list[Any] = [bytes([number % 251]) * (number % 7) for number in range(5000)]
    parts += [os.urandom((9 << 20) + 1), b"", memoryview(bytearray(b"end"))]
    with (tmp_path / "file").open("wb") as file:
        assert half("write_all")(file.fileno(), parts) == sum(len(part) for part in parts)
        assert half("write_all")(file.fileno(), []) == 0
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def _write_places(handle: int, parts: list[bytes], least: int) -> int:
    addresses = np.array([np.frombuffer(part, np.uint8).ctypes.data for part in parts], np.int64)
    return int(native().write_places(handle, addresses, np.array(list(map(len, parts)), np.int64), least))


def test_places_that_make_no_sense_are_refused() -> None:
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    for addresses, sizes in ((one, two), (two, one - 1), (b"1234", b"1234"), (one, one - 1)):
        with pytest.raises(ValueError, match=r"sizes|size"):
            native().write_places(-1, addresses, sizes)
    assert native().write_places(-1, b"", b"") == 0


@given(
    st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 5000)), max_size=12),
    st.sampled_from([0, 1, 4095, 4096, 123_457]),
)
@settings(max_examples=scaled(25, 400), deadline=None)
def test_what_goes_past_the_cache_is_the_same_file(spans: list[tuple[int, int]], at: int) -> None:
    parts = [_RANDOM[begin : begin + size] for size, begin in spans] + [_RANDOM] * (len(spans) % 3)
    for write in (native().write_all, copying._write_all, _write_places):
        with tempfile.TemporaryFile(buffering=0, dir=Path.cwd()) as file:
            file.seek(at)
            for each in (parts, [b"more", *parts[:2]]):
                assert write(file.fileno(), each, 0) == sum(map(len, each))
            assert not fcntl.fcntl(file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
            file.seek(0)
            assert file.read() == bytes(at) + b"".join([*parts, b"more", *parts[:2]])


def test_what_goes_past_the_cache_may_come_to_its_limit(half: Half, tmp_path: Path) -> None:
    """Of a process whose files may have so many bytes: what fits is there, then comes the error."""
    limit = (5 << 20) + 700
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with (
            (tmp_path / "file").open("wb", buffering=0) as file,
            pytest.raises(OSError, match="File too large"),
        ):
            half("write_all")(file.fileno(), [_RANDOM] * 20, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "file").read_bytes() == (_RANDOM * 20)[:limit]


def test_what_takes_no_direct_writes_is_written_as_ever(half: Half) -> None:
    reader, writer = os.pipe()
    assert half("write_all")(writer, [b"1" * 5000], 0) == 5000
    assert os.read(reader, 9000) == b"1" * 5000
    os.close(writer)
    os.close(reader)


def test_writing_to_what_takes_little_at_a_time_waits_and_ends(half: Half) -> None:
    reader, writer = os.pipe()
    found = bytearray()

    def read() -> None:
        while piece := os.read(reader, 7000):
            found.extend(piece)

    thread = threading.Thread(target=read)
    thread.start()
    sent = os.urandom(300_000)
    half("write_all")(writer, [sent[:100], sent[100:250_000], sent[250_000:]])
    os.close(writer)
    thread.join(20)
    os.close(reader)
    assert bytes(found) == sent


def test_a_signal_ends_a_write_that_waits(half: Half) -> None:
    reader, writer = os.pipe()

    class EnoughError(Exception):
        pass

    def ring(*_: object) -> None:
        raise EnoughError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(EnoughError):
            half("write_all")(writer, [bytes(1 << 20)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(reader)
        os.close(writer)


def test_an_error_of_the_system_is_raised(half: Half) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        half("write_all")(-1, [b"1"])


def test_reading_gives_whole_regular_files_and_says_of_all_others_that_it_did_not(
    half: Half, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "b").write_bytes(b"second" * 30)
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = ["a", "b", "empty", "link", "folder", "pipe", "missing", "a", "a"]
    sizes = [5, 180, 0, 5, 0, 0, 3, 5, 4]
    target = bytearray(b"?" * 800)
    found = half("read_files")(target, str(tmp_path), names, sizes)
    # What could not be read leaves its room free.
    assert found == [0, 64, 256, -1, -1, -1, -1, 384, -1]
    assert target[:5] == b"first" and target[64:244] == b"second" * 30 and target[384:389] == b"first"
    (tmp_path / "folder" / "c").write_bytes(b"third")
    names, sizes, found = [*names, "folder/c", "folder/../a"], [*sizes, 5, 5], [*found, 0, -1]
    for name, size, place in zip(names, sizes, found, strict=True):
        # One alone is read in another way.
        memory = bytearray(size)
        assert half("read_files")(memory, str(tmp_path), (name,), (size,)) == [min(place, 0)]
        if place >= 0:
            assert memory == (tmp_path / name).read_bytes()


def test_identities_tell_hard_links_from_other_files(half: Half, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "c").write_bytes(b"first")
    os.link(tmp_path / "a", tmp_path / "b")
    one, same, other, none = half("identities")([str(tmp_path / name) for name in ("a", "b", "c", "no")])
    state = os.lstat(tmp_path / "a")
    assert one == same == (state.st_dev, state.st_ino, 5, state.st_mtime_ns)
    assert other != one and none is None


def packed(ranges: list[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack("=qq", *each) for each in ranges)


@given(
    st.lists(st.tuples(st.integers(-2, 320), st.integers(-2, 320)), max_size=12),
    st.lists(st.integers(0, 90), max_size=12),
    st.integers(0, 200),
)
def test_ranges_of_a_file_are_hashed_as_far_as_it_goes(
    anywhere: list[tuple[int, int]], sizes: list[int], room: int
) -> None:
    data = bytes(range(256)) + b"end" * 10
    # Those that touch each other are read together.
    ends = list(itertools.accumulate(sizes, initial=3))
    for ranges in (anywhere, list(itertools.pairwise(ends)), [*itertools.pairwise(ends), *anywhere]):
        sound = all(0 <= begin <= end <= begin + room for begin, end in ranges)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            each = [0, len(ranges) // 2, len(ranges) - len(ranges) // 2]
            files = packed([(file.fileno(), count) for count in each])
            found = both("hash_ranges", files, packed(ranges), bytearray(room))
        if not sound:
            assert [kind for kind, _ in found] == ["ValueError"] * 2
            continue
        assert found[0] == found[1] and found[0][0] == "returned"
        nothing, *own = found[0][1]
        assert nothing == b"" and len(own) == 2
        for digests, part in zip(own, (ranges[: each[1]], ranges[each[1] :]), strict=True):
            expected = b""
            for begin, end in part:
                if end > len(data) and end > begin:
                    break
                expected += xxhash.xxh3_128_digest(data[begin:end])
            # Ranges are read in groups: one that fails leaves out those that were to be read with it.
            assert expected.startswith(digests)
            if all(end <= len(data) for _, end in part):
                assert digests == expected


@pytest.mark.parametrize("pair", [(0, 2**63 - 1), (-1, 0), (2**62, -(2**62)), (5, 4), (-(2**63), 2**63 - 1)])
def test_hostile_ranges_are_refused(half: Half, pair: tuple[int, int]) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(100))
        file.flush()
        hash_ranges, handle = half("hash_ranges"), file.fileno()
        with pytest.raises(ValueError, match=r"range 1: .* is none of at most 64 bytes"):
            hash_ranges(packed([(handle, 2)]), packed([(0, 1), pair]), bytearray(64))
        for files, ranges in ((bytes(15), b""), (packed([(handle, 0)]), bytes(15))):
            with pytest.raises(ValueError, match="64-bit"):
                hash_ranges(files, ranges, bytearray(64))
        with pytest.raises((TypeError, BufferError)):
            hash_ranges(packed([(handle, 1)]), packed([(0, 1)]), bytes(64))
        for counts in ([], [0], [2], [-1], [2, -1], [2**63 - 1, 2], [1, 1], [-(2**63), 1]):
            with pytest.raises(ValueError, match="range"):
                hash_ranges(packed([(handle, each) for each in counts]), packed([(0, 1)]), bytearray(64))
        # Far behind the file's end there is nothing.
        far = packed([(2**63 - 9, 2**63 - 1)])
        assert hash_ranges(packed([(handle, 1)]), far, bytearray(64)) == [b""]
        # What is none does not cost the others.
        one = [xxhash.xxh3_128_digest(bytes(1))]
        for none in (-1, 2**31, 2**40 + handle, -(2**63)):
            mixed = packed([(none, 1), (handle, 1)])
            assert hash_ranges(mixed, packed([(0, 1)] * 2), bytearray(64)) == [b"", *one]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 900))
def test_reading_lays_files_out_alike(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], room: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    for number, size in enumerate(sizes):
        (folder / str(number)).write_bytes(os.urandom(size))
    names = [str(number) for number in range(len(sizes))]
    one, other = both("read_files", bytearray(room), str(folder), names, sizes)
    assert one == other


@pytest.mark.skipif(not copying.can_write_from(), reason="the system has no writev")
@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 5000), rows=st.lists(st.integers(0, 99), max_size=1500), taken=st.integers(1, 9999)
)
def test_rows_are_written_from_their_addresses_however_little_is_taken_at_a_time(
    width: int, rows: list[int], taken: int
) -> None:
    memory = np.frombuffer(os.urandom(100 * width), np.uint8)
    addresses = memory.ctypes.data + width * np.array(rows, np.int64)
    expected = b"".join(memory[width * row : width * (row + 1)].tobytes() for row in rows)
    with tempfile.TemporaryFile() as file:
        copying.write_from(file.fileno(), addresses, width)
        file.seek(0)
        assert file.read() == expected
    receiver, sender = os.pipe()
    received = bytearray()

    def receive() -> None:
        while part := os.read(receiver, taken):
            received.extend(part)

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        copying.write_from(sender, addresses, width)
    finally:
        os.close(sender)
        thread.join(60)
        os.close(receiver)
    assert received == expected


@pytest.mark.skipif(not copying.can_write_from(), reason="the system has no writev")
def test_addresses_without_memory_are_an_error_and_end_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as file:
        with pytest.raises(OSError, match="Bad address"):
            copying.write_from(file.fileno(), np.array([4096], np.int64), 16)
        monkeypatch.setattr(copying, "_writev", None)
        assert not copying.can_write_from()
        with pytest.raises(OSError, match="not implemented"):
            copying.write_from(file.fileno(), np.array([4096], np.int64), 16)
