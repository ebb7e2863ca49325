"""Damaged runs: whatever happens to their JSON and their bytes, readers answer with a TlcoreError at most."""

from __future__ import annotations

import copy
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tlcore
from tests.fuzz.settings import cases
from tests.hostile.files import sound
from tests.reading import read_all, run_commands
from tlcore.errors import ReadError, TlcoreError
from tlcore.layout.run_files import parse
from tlcore.reader.documents import check_run, check_step, check_structure
from tlcore_backends.pt.decode import decode
from tlcore_backends.pt.zip_parts import PtError

pytestmark = pytest.mark.slow
__all__ = ["sound"]

NUMBERS = st.integers(-3, 3) | st.sampled_from([1 << 31, 1 << 40, 1 << 63, 1 << 64, 10**400, -(1 << 63)])
TELLING = [
    *(".", "..", "../x", "/etc/passwd", "step_0/a/b", "step_1", "pt", "safetensors", "complete", "nan"),
    *("float32", "bits8", "torch.float32", "tensor", "tuple", "dict", "xxh3-128:" + "0" * 32),
]
TEXTS = st.sampled_from([*TELLING, "", "a\0b", "\x1b[2J"]) | st.text(max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def change(draw: st.DrawFn, document: Any) -> Any:
    """Replace, remove, double or swap values somewhere in a document."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(document), key=repr)))
        if not path:
            return draw(VALUES)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap", "wrap"]))
        if how == "remove":
            del parent[path[-1]]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif how == "swap":
            other = draw(st.sampled_from(sorted(places(document), key=repr)))
            value: Any = document
            for key in other:
                value = value[key]
            parent[path[-1]] = copy.deepcopy(value)
        elif how == "wrap":
            parent[path[-1]] = [parent[path[-1]]]
        else:
            parent[path[-1]] = draw(VALUES)
    return document


def spoil(draw: st.DrawFn, data: bytes) -> bytes:
    """Flip, cut, insert, double or splice bytes."""
    spoilt = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(spoilt) - 1)))
        how = draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "remove", "double"]))
        length = draw(st.integers(1, 16))
        if how == "flip" and spoilt:
            spoilt[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            spoilt[at : at + 4] = draw(
                st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"PK\x03\x04"])
            )
        elif how == "cut":
            del spoilt[at:]
        elif how == "insert":
            spoilt[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif how == "remove":
            del spoilt[at : at + length]
        else:
            spoilt[at:at] = spoilt[at : at + length]
    return bytes(spoilt)


@pytest.fixture(scope="module")
def documents(sound: dict[str, Path]) -> dict[str, Any]:
    """The JSON documents of both runs, by backend and name."""
    return {
        f"{backend}:{path.relative_to(run)}": json.loads(path.read_text())
        for backend, run in sound.items()
        for path in sorted(run.rglob("*.json"))
    }


@given(data=st.data())
@cases(250, 2500)
def test_documents_are_refused_or_sound(documents: dict[str, Any], data: st.DataObject) -> None:
    """The checks themselves, without files: what passes them has the types that the reader relies on."""
    name = data.draw(st.sampled_from(sorted(documents)))
    document = data.draw(st.composite(change)(copy.deepcopy(documents[name])))
    try:
        value = parse(json.dumps(document).encode(), name)
    except ReadError:
        return
    check = check_run if name.endswith("run.json") else check_structure
    try:
        if name.endswith("step.json"):
            step = check_step(value, name, 0)
            assert all(
                isinstance(each["name"], str) and each["shape"] is not None for each in step["records"]
            )
        else:
            check(value, name)
    except ReadError:
        return


def damaged_copy(run: Path, directory: str) -> Path:
    return Path(shutil.copytree(run, Path(directory, "runs", "run")))


def survives(run: Path, sound: Path, directory: str, commands: bool) -> None:
    read_all(run)
    if commands:
        scratch = Path(directory, "scratch")
        scratch.mkdir()
        run_commands(run, sound, scratch, html=False)


@given(data=st.data())
@cases(60, 1200)
def test_a_run_with_changed_json_is_survived(
    sound: dict[str, Path], documents: dict[str, Any], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(documents)))
    backend, _, file = name.partition(":")
    document = data.draw(st.composite(change)(copy.deepcopy(documents[name])))
    with tempfile.TemporaryDirectory() as directory:
        run = damaged_copy(sound[backend], directory)
        (run / file).unlink()
        (run / file).write_text(json.dumps(document))
        survives(run, sound["pt"], directory, data.draw(st.booleans()))


@given(data=st.data())
@cases(60, 1200)
def test_a_run_with_changed_bytes_is_survived_and_never_passes_for_sound(
    sound: dict[str, Path], data: st.DataObject
) -> None:
    backend = data.draw(st.sampled_from(sorted(sound)))
    files = sorted(path for path in sound[backend].rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files)).relative_to(sound[backend])
    before = (sound[backend] / file).read_bytes()
    after = data.draw(st.composite(spoil)(before))
    with tempfile.TemporaryDirectory() as directory:
        run = damaged_copy(sound[backend], directory)
        (run / file).unlink()
        (run / file).write_bytes(after)
        survives(run, sound["pt"], directory, data.draw(st.booleans()))
        if file.suffix in (".pt", ".safetensors"):
            only_what_was_stored(run, sound[backend])


def only_what_was_stored(run: Path, sound: Path) -> None:
    """A run that verifies holds the tensors that were stored, however its bytes were changed."""
    original = tlcore.open_run(sound).step(0)
    try:
        opened = tlcore.open_run(run)
        opened.verify()
    except TlcoreError:
        return
    for name, tensor in opened.step(0).items():
        assert tensor.numpy().tobytes() == original[name].numpy().tobytes()


def tensors() -> st.SearchStrategy[torch.Tensor]:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
    shapes = st.lists(st.integers(0, 4), max_size=3)
    return st.builds(lambda dtype, shape: torch.zeros(shape, dtype=dtype), dtypes, shapes)


@given(tensor=tensors(), data=st.data())
@cases(150, 2500)
def test_a_changed_pt_file_is_a_tensor_or_an_error(tensor: torch.Tensor, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    whole = buffer.getvalue()
    assert decode(whole).shape == tensor.shape and decode(whole).dtype == tensor.dtype
    spoilt = data.draw(st.composite(spoil)(whole))
    try:
        decoded = decode(spoilt)
    except PtError:
        return
    assert decoded.numel() * decoded.element_size() <= len(spoilt)
