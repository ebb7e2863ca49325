"""Files below a directory, read and hashed: both halves do the same, whatever lies there."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hotpath.halves import half_of, native
from tlcore.hotpath import beneath, payloads

TWINS: dict[str, Callable[..., Any]] = {
    "read_texts": beneath._read_texts,
    "hash_payloads": payloads._hash_payloads,
    "list_files": beneath._list_files,
}
LARGE = (600 << 10) + 3


half = half_of(TWINS)
Half = Callable[[str], Callable[..., Any]]


def tree(folder: Path) -> list[str]:
    """Files, links, and what is neither, with a name for each way that there is to them."""
    (folder / "a").mkdir()
    (folder / "a" / "one").write_bytes(b"first")
    (folder / "a" / "empty").touch()
    (folder / "large").write_bytes(bytes(range(251)) * (LARGE // 251) + b"x" * (LARGE % 251))
    (folder / "other").write_bytes(b"first")
    os.link(folder / "a" / "one", folder / "hard")
    (folder / "soft").symlink_to("other")
    (folder / "way").symlink_to("a")
    (folder / "out").symlink_to(folder.parent)
    (folder.parent / f"{folder.name}-secret").write_bytes(b"first")
    os.mkfifo(folder / "pipe")
    secret = f"{folder.name}-secret"
    names = [
        "a/one",
        "a/empty",
        "large",
        "other",
        "hard",
        "soft",
        "way/one",
        "pipe",
        "a",
        "missing",
        "a/no/x",
    ]
    names += [
        f"out/{secret}",
        f"../{secret}",
        "a/../other",
        "./other",
        "a//one",
        "/etc/passwd",
        "",
        "a/",
        "é",
    ]
    return [*names, "a/one/x", str(folder / "other")]


GOOD = {"a/one": b"first", "a/empty": b"", "other": b"first", "hard": b"first"}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("beneath") / "root"
    folder.mkdir()
    return folder, tree(folder)


def packed(spans: list[tuple[int, int, int]]) -> bytes:
    return b"".join(struct.pack("=qqq", *each) for each in spans)


def test_texts_are_those_of_regular_files_that_no_link_leads_to(half: Half, there: Any) -> None:
    folder, names = there
    found = dict(zip(names, half("read_texts")(str(folder), names, 100), strict=True))
    assert found == {name: GOOD.get(name) for name in names}
    large = half("read_texts")(str(folder), ["large", "other"], LARGE)
    assert len(large[0]) == LARGE and large[1] is None
    assert half("read_texts")(str(folder), ["other", "other", "hard"], 10) == [b"first", b"first", None]
    assert half("read_texts")(str(folder / "nowhere"), ["other"], 10) == [None]
    # The directory itself is chosen by the user, and may be a link.
    assert half("read_texts")(str(folder / "way"), ["one"], 10) == [b"first"]


@pytest.mark.parametrize("most", [-1, 1 << 63, 1 << 200, "x"])
def test_hostile_numbers_and_names_are_refused(half: Half, there: Any, most: Any) -> None:
    folder, _ = there
    with pytest.raises((ValueError, TypeError)):
        half("read_texts")(str(folder), ["other"], most)
    with pytest.raises(ValueError, match="null"):
        half("read_texts")(str(folder), ["other\0"], 9)
    with pytest.raises(TypeError):
        half("read_texts")(str(folder), [3], 9)
    with pytest.raises(ValueError, match="null"):
        half("hash_payloads")(str(folder), ["a\0/b"], packed([(0, 0, 0)]), bytearray(1))


def test_a_payload_is_hashed_and_what_is_around_it_kept(half: Half, there: Any) -> None:
    folder, names = there
    data = {name: (folder / name).read_bytes() for name in [*GOOD, "large"]}
    spans = [(len(data.get(name, b"")), *((2, 4) if data.get(name) else (0, 0))) for name in names]
    spans[names.index("large")] = (LARGE, 1000, LARGE - 300_000)
    room = sum(size - (end - begin) for size, begin, end in spans)
    kept = bytearray(b"?" * room)
    first, digests = half("hash_payloads")(str(folder), names, packed(spans), kept)
    at = 0
    for index, (name, (size, begin, end)) in enumerate(zip(names, spans, strict=True)):
        if name not in data:
            assert first[index] == -1, name
            continue
        assert digests[16 * index : 16 * index + 16] == xxhash.xxh3_128_digest(data[name][begin:end])
        assert first[index] == (names.index("a/one") if name == "hard" else index)
        around = data[name][:begin] + data[name][end:]
        assert kept[at : at + size - (end - begin)] == (around if name != "hard" else b"?" * len(around))
        at += size - (end - begin)


@pytest.mark.parametrize(
    "span",
    [
        (5, -1, 4),
        (5, 4, 2),
        (5, 2, 6),
        (-1, 0, 0),
        (2**63 - 1, 0, 1),
        (2**63 - 1, 0, 2**63 - 1),
        (5, 0, -(2**63)),
    ],
)
def test_hostile_spans_are_refused_or_find_nothing(half: Half, there: Any, span: Any) -> None:
    folder, _ = there
    names, kept = ["other", "other"], bytearray(10)
    if span == (2**63 - 1, 0, 2**63 - 1):
        first, _ = half("hash_payloads")(str(folder), names, packed([(5, 0, 5), span]), kept)
        assert first == [0, -1]
        return
    with pytest.raises(ValueError, match=r"span 1: .* makes no sense, or leaves too many"):
        half("hash_payloads")(str(folder), names, packed([(5, 0, 5), span]), kept)
    with pytest.raises(ValueError, match="as many spans"):
        half("hash_payloads")(str(folder), names, packed([(5, 0, 5)]), kept)
    with pytest.raises((TypeError, BufferError)):
        half("hash_payloads")(str(folder), [], b"", bytes(1))


def outcomes(name: str, *args: Any) -> Iterator[Any]:
    """What each half returns or raises, and what it writes."""
    for function in (getattr(native(), name), TWINS[name]):
        target = [bytearray(b"?" * each) if isinstance(each, int) else each for each in args]
        try:
            yield function(*target), target
        except (ValueError, TypeError, OSError) as error:
            yield type(error).__name__, str(error)


@settings(max_examples=60)
@given(st.data())
def test_both_halves_hash_and_keep_the_same(there: Any, data: st.DataObject) -> None:
    folder, names = there
    sizes = {"large": LARGE, "a/empty": 0}
    number = st.integers(-1, 7) | st.sampled_from([LARGE, 1 << 18, (1 << 18) + 1, 400_000])
    chosen, spans = [], []
    for name in data.draw(st.lists(st.sampled_from(names), max_size=8)):
        begin, end = data.draw(number), data.draw(number)
        right = data.draw(st.booleans())
        size = sizes.get(name, 5) if right else data.draw(number)
        chosen.append(name)
        within = sorted((max(0, min(begin, size)), max(0, min(end, size))))
        spans.append((size, *(within if right else (begin, end))))
    room = data.draw(st.integers(0, 40) | st.just(3 * LARGE))
    one, other = outcomes("hash_payloads", str(folder), chosen, packed(spans), room)
    assert one == other


def test_a_file_that_is_replaced_meanwhile_is_read_anew(half: Half, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first")
    os.link(tmp_path / "a", tmp_path / "b")
    spans = packed([(5, 0, 5), (5, 0, 5), (5, 0, 4), (5, 0, 5)])
    first, digests = half("hash_payloads")(str(tmp_path), ["a", "b", "a", "b"], spans, bytearray(1))
    # Another part of it is read for itself, and what follows compared with that.
    assert first == [0, 0, 2, 3]
    whole, part = xxhash.xxh3_128_digest(b"first"), xxhash.xxh3_128_digest(b"firs")
    assert digests == whole * 2 + part + whole


def listed(half: Half, directory: object, name: str) -> list[str] | None:
    found = half("list_files")(str(directory), name)
    return None if found is None else sorted(found)


def test_all_files_below_a_directory_are_listed(tmp_path: Path, half: Half) -> None:
    many = [f"step/call{number % 7}/{'deep/' * (number % 3)}{number:060}" for number in range(3000)]
    for name in [*many, "step/é", "beside/x"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "step" / "empty").mkdir()
    (tmp_path / "step" / "link").symlink_to("é")
    (tmp_path / "step" / "way").symlink_to("../beside")
    os.mkfifo(tmp_path / "step" / "pipe")
    assert listed(half, tmp_path, "step") == sorted([*many, "step/é"])
    assert listed(half, tmp_path, "step/call0/deep") == sorted(
        name for name in many if name.startswith("step/call0/deep/")
    )


def test_what_cannot_be_listed_is_left_to_others(there: tuple[Path, list[str]], half: Half) -> None:
    folder, names = there
    nothing = ("a/one", "a/empty", "other", "hard", "large", "pipe", "missing", "a/no/x", "a/one/x", "é")
    expected: dict[str, list[str]] = {"a": ["a/empty", "a/one"], **{name: [] for name in nothing}}
    for name in names:
        assert listed(half, folder, name) == expected.get(name), name
    assert listed(half, folder / "missing", "a") is None
    with pytest.raises(ValueError, match="null"):
        half("list_files")(str(folder), "a\0b")


def test_what_is_nested_deeper_than_a_path_can_tell_is_left_to_others(tmp_path: Path, half: Half) -> None:
    (tmp_path / "step").mkdir()
    handle = os.open(tmp_path / "step", os.O_RDONLY)
    for _ in range(25):
        os.mkdir("n" * 200, dir_fd=handle)
        inner = os.open("n" * 200, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    try:
        assert listed(half, tmp_path, "step") is None
    finally:
        shutil.rmtree(tmp_path / "step")
