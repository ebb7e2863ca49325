"""The documentation agrees with what it is made from."""

from __future__ import annotations

import re
from pathlib import Path

from tlcore.config.table import table

README = Path(__file__).parents[1] / "README.md"
MARKER = "<!-- config-table -->"


def test_the_readme_has_the_configuration_table_of_the_schema() -> None:
    parts = README.read_text(encoding="utf-8").split(MARKER)
    assert len(parts) == 3, f"README.md needs the table between two lines {MARKER}"
    advice = "paste the output of `python -m tlcore.config.table` between the markers"
    assert parts[1].strip() == table(), advice


def test_every_fault_in_the_readme_names_a_test_that_exists() -> None:
    section = README.read_text(encoding="utf-8").split("## Reliability", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.endswith("| test |")]
    assert len(rows) >= 18
    for row in rows:
        named = re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", row.rsplit(" | ", 1)[1])
        assert named, row
        file = ""
        for given, name in named:
            file = given or file
            places = [README.parent / folder / file for folder in ("tests/faults", "tests", ".")]
            (text, *_) = (place.read_text(encoding="utf-8") for place in places if place.is_file())
            assert f"def {name}(" in text, f"{file}::{name}"
