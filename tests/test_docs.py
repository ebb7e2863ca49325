"""The documentation agrees with what it is made from."""

from __future__ import annotations

from pathlib import Path

from tlcore.cli.config_table import table

README = Path(__file__).parents[1] / "README.md"
MARKER = "<!-- config-table -->"


def test_the_readme_has_the_configuration_table_of_the_schema() -> None:
    parts = README.read_text(encoding="utf-8").split(MARKER)
    assert len(parts) == 3, f"README.md needs the table between two lines {MARKER}"
    advice = "paste the output of `python -m tlcore.cli.config_table` between the markers"
    assert parts[1].strip() == table(), advice
