"""`tlcore selftest`: what it refuses before it starts anything."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.reading import command


@pytest.mark.parametrize("package", ["vllm", "transformers"])
def test_it_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        # As the finder answers where the package is not installed; the other one may not be there either.
        return None if name == package else find("tlcore") if name in ("vllm", "transformers") else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    status, said = command("selftest", "somewhere")
    assert status == 2 and f"selftest needs {package}, which is not installed; pip install {package}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ways", "alone,sideways"], "--ways: 'sideways' is not one of transformers, alone, batched"),
        (["--dtype", "int8"], "--dtype: 'int8' is not one of float32"),
        (["--engine-args", "{"], "--engine-args: '{' is no JSON"),
        (["--engine-args", "[]"], "--engine-args: '[]' is no JSON object"),
        (["--keep", "."], "--keep takes a new one"),
    ],
    ids=["ways", "dtype", "no JSON", "no object", "keep"],
)
def test_wrong_arguments_are_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = command("selftest", "somewhere", *words)
    assert status == 2 and said in output


@pytest.mark.parametrize("place", ["/nowhere/at/all", "./nowhere", "empty"])
def test_a_place_without_a_checkpoint_is_said_before_an_engine_starts(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    status, output = command("selftest", place)
    assert status == 2 and f"MODEL: {place!r} is no checkpoint for transformers: it has no config" in output
