"""Indexes of segments that are alike are read by what differs, and are what parsing them says."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.deep import scaled
from tlcore.errors import ReadError
from tlcore.layout.run_files import parse
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors.index import SegmentIndex
from tlcore_backends.safetensors.index_reading import IndexReader
from tlcore_backends.safetensors.shared_arrays import ArraysText, OwnArrays
from tlcore_backends.safetensors.skeletons import Skeletons, form_of

from .emitting import opened


def texts_of(steps: Sequence[int], name: str = "a") -> list[bytes]:
    """The indexes of segments of so many steps each."""
    generator = torch.Generator().manual_seed(0)
    store = MemoryStore()
    sink, emitter = opened(store, commit_s=100)
    number = 0
    for count in steps:
        for _ in range(count):
            hidden = torch.randn(3, 4, generator=generator)
            emitter.step(
                number,
                {
                    f"{name}/outputs_cpu": hidden,
                    "b/inputs_0_cpu": hidden,
                    "c/outputs_cpu": torch.randn(2, generator=generator),
                    "d/outputs_cpu": torch.tensor(number),
                },
                rows=[{"request_id": f"r{number}", "first_row": 0, "rows": 3, "first_position": number}],
            )
            number += 1
        sink.flush()
    sink.close()
    return [data for key, data in sorted(store.blobs.items()) if "_steps_" in key]


@pytest.fixture(scope="module")
def texts() -> list[bytes]:
    return texts_of([1] * 8)


def remembering(*texts: bytes) -> IndexReader:
    """A reader that has read these."""
    reader = IndexReader()
    for text in texts:
        read = reader.read(text, "index")
        reader.remember(read, SegmentIndex(read.document, "index", len(text), read.common).places)
    return reader


def plain(document: Any) -> Any:
    """A document with all of its arrays and skeletons made."""
    if not isinstance(document, dict):
        return document
    made = OwnArrays, Skeletons
    return {key: list(value) if isinstance(value, made) else value for key, value in document.items()}


def said(read: Callable[[bytes], Any], text: bytes) -> Any:
    """What reading gives, or the error's text."""
    try:
        return read(text)
    except ReadError as error:
        return str(error)


def same_places(read: Any, text: bytes) -> None:
    """Where its arrays lie, and their hashes, are those of the parsed text."""
    mine = SegmentIndex(read.document, "index", len(text), read.common)
    other = SegmentIndex(parse(text, "index"), "index", len(text))
    count = len(other.entries("arrays"))
    assert [mine.places.of(each) for each in range(count)] == [other.places.of(each) for each in range(count)]
    assert mine.places.layout == other.places.layout
    assert mine.places.hashes.tobytes() == other.places.hashes.tobytes()
    assert mine.places.begins == other.places.begins
    assert [mine.document(step) for step in mine.steps] == [other.document(step) for step in other.steps]


@pytest.mark.parametrize("steps", [[1] * 5, [3, 3, 1, 3, 2], [1, 40, 40]])
def test_what_was_read_is_what_parsing_says(steps: list[int]) -> None:
    texts = texts_of(steps)
    reader = remembering(texts[0])
    shared = 0
    for text in texts[1:]:
        read = reader.read(text, "index")
        assert plain(read.document) == json.loads(text)
        same_places(read, text)
        shared += isinstance(read.document["arrays"], OwnArrays)
    assert shared == len(texts) - 1


def test_the_tables_of_alike_indexes_are_parsed_once(texts: list[bytes]) -> None:
    reader = remembering(texts[0])
    first, second = (reader.read(text, "index") for text in texts[1:3])
    assert first.common is second.common
    for table in ("calls", "structures", "plans", "extents"):
        assert first.document[table] is second.document[table]
    assert first.document["arrays"][0] != second.document["arrays"][0]


def mutations(text: bytes, chance: random.Random, count: int) -> list[bytes]:
    """The text with a few bytes exchanged, left out, put in or doubled."""
    found = []
    for _ in range(count):
        at, end = sorted(chance.randrange(len(text)) for _ in range(2))
        end = min(end, at + chance.randrange(1, 40))
        piece = chance.choice(
            [
                bytes([chance.randrange(256)]),
                chance.choice([b'"', b",", b",\n", b"\\", b"=", b"1", b" ", b"}", b"]", b'"hashes":"AAAA",']),
                text[at:end] * 2,
                text[at:end][::-1],
                b"",
            ]
        )
        found.append(text[:at] + piece + text[chance.choice([at + len(piece), end]) :])
    return found


def test_a_damaged_text_is_read_as_parsing_does(texts: list[bytes]) -> None:
    chance = random.Random(4)
    reader = remembering(texts[0])
    shared = refused = 0
    for text in mutations(texts[1], chance, scaled(1500, 60_000)):
        document = said(lambda data: parse(data, "index"), text)
        found = said(lambda data: reader.read(data, "index").document, text)
        assert plain(found) == document
        refused += isinstance(document, str)
        shared += isinstance(found.get("arrays"), OwnArrays) if isinstance(found, dict) else 0
    assert refused > 100 and shared > 10


def test_hashes_of_another_form_are_not_taken_for_these(texts: list[bytes]) -> None:
    reader = remembering(texts[0])
    for old, new in ((b'=="', b'A="'), (b'=="', b'AA"'), (b'"hashes":"', b'"hashes":"='), (b"==", b"\\u")):
        text = texts[1].replace(old, new, 1)
        assert text != texts[1]
        try:
            document = reader.read(text, "index").document
        except ReadError:
            with pytest.raises(ReadError):
                parse(text, "index")
            continue
        assert isinstance(document["arrays"], list)
        assert plain(document) == json.loads(text)


def test_only_what_is_surely_the_hashes_is_a_pattern(texts: list[bytes]) -> None:
    text = next(part for part in texts[0].split(b",\n") if part.startswith(b'"arrays":'))
    for old, new in (
        (b'"hashes":"', b'"hashes": "'),
        (b'"path":[', b'"hashes":"AAAA","path":['),
        (b'"device":"cpu"', b'"device":"\\u0063pu"'),
        (b'"path":[]', b'"path":[{"hashes":"AAAA"}]'),
    ):
        changed = text.replace(old, new, 1)
        assert changed != text
        entries = json.loads(b"{" + changed + b"}")["arrays"]
        places = SegmentIndex({**json.loads(texts[0]), "arrays": entries}, "index").places
        assert ArraysText.of(changed, entries, places) is None
    entries = json.loads(b"{" + text + b"}")["arrays"]
    places = SegmentIndex({**json.loads(texts[0]), "arrays": entries}, "index").places
    assert ArraysText.of(text, entries, places) is not None


def test_hashes_beside_those_of_another_array_are_not_mistaken_for_its_own() -> None:
    changed = []
    for text in texts_of([2] * 3):
        arrays = json.loads(text)["arrays"]
        same = next(each for each in arrays if each.get("same_as") is not None)
        same["hashes"] = arrays[-1]["hashes"]
        begin = text.index(b'"arrays":')
        table = json.dumps(arrays, separators=(",", ":")).encode()
        changed.append(text[:begin] + b'"arrays":' + table + text[text.index(b",\n", begin) :])
    reader = remembering(changed[0])
    for text in changed[1:]:
        read = reader.read(text, "index")
        told = SegmentIndex(read.document, "index", len(text), read.common).places
        parsed = SegmentIndex(json.loads(text), "index", len(text)).places
        assert told.hashes.tobytes() == parsed.hashes.tobytes() and told.layout == parsed.layout


def test_a_table_is_taken_only_from_the_object_itself(texts: list[bytes]) -> None:
    """Divided at line ends, what lies in another object looks like a table of the index."""
    reader = remembering(texts[0])
    inner = texts[1].replace(b',\n"calls":', b',\n"other":{"a":1,\n"calls":', 1)
    inner = inner.replace(b',\n"structures":', b'},\n"structures":', 1)
    for text in (inner, texts[1].replace(b',\n"rank":0', b',\n"rank":0,\n"calls":[]', 1)):
        assert plain(reader.read(text, "index").document) == json.loads(text)


def blanked(value: Any) -> Any:
    """A JSON value without its texts that are no keys."""
    if isinstance(value, dict):
        return {key: blanked(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(blanked, value))
    return "" if isinstance(value, str) else value


def test_texts_of_one_form_are_alike_but_for_what_their_strings_say() -> None:
    parts = ['"', ":", ",", "[", "]", "a", '"a"', '"b"', '"":', "xxh3-128:", "\\"]
    by_form: dict[bytes, list[str]] = {}
    for chosen in itertools.product(parts, repeat=5):
        text = '{"k":' + "".join(chosen) + "}"
        form = form_of(text.encode())
        assert (form is None) == ("\\" in text)
        if form is not None:
            by_form.setdefault(form, []).append(text)
    shared = 0
    for texts in by_form.values():
        found: list[Any] = []
        for text in texts:
            try:
                found.append(blanked(json.loads(text)))
            except ValueError:
                found.append(None)
        assert found.count(found[0]) == len(found), texts
        shared += len(found) > 1 and found[0] is not None
    assert shared > 5


def test_skeletons_of_one_form_are_looked_at_once(texts: list[bytes]) -> None:
    reader = remembering(*texts[:3])
    first, second = (reader.read(text, "index").document["skeletons"] for text in texts[4:6])
    assert isinstance(first, Skeletons) and first.known is second.known
    assert list(first) != list(second)
    longer = texts[6].replace(b'"skeletons":[', b'"skeletons":[0,', 1)
    other = reader.read(longer, "index").document["skeletons"]
    assert len(other) == len(first) + 1 and other.known is not first.known


def test_a_reader_remembers_few(texts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    others = [texts_of([1], f"m{number}")[0] for number in range(12)]
    reader = remembering(*others)
    assert len(reader._seen) == 8
    monkeypatch.setattr("tlcore_backends.safetensors.index_reading._MOST_BYTES", 3 * len(others[0]) + 50)
    assert len(remembering(*others)._seen) <= 3
