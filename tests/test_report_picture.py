"""The README's picture of the HTML report is what its script draws, and small."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.documents import README
from tests.report_picture import PICTURE, draw

MOST = 150_000


def size(file: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_readme_shows_it_and_it_is_small() -> None:
    assert f"](examples/{PICTURE.name})" in README.read_text(encoding="utf-8")
    assert PICTURE.stat().st_size < MOST


@pytest.mark.slow
def test_the_script_makes_it_again(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    draw(tmp_path / "again.png")
    assert 30_000 < (tmp_path / "again.png").stat().st_size < MOST
    # Fonts differ from machine to machine, and with them some lines of text.
    (width, height), (other, tall) = size(PICTURE), size(tmp_path / "again.png")
    assert abs(width - other) < 20 and abs(height - tall) < 60
