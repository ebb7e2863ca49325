"""The documentation agrees with what it is made from, and every block in it is of a kind that is tested."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from pathlib import Path

import pytest

from tests.documents import EXAMPLES, GUIDES, PAGES, README, ROOT, attributes, blocks, commands
from tlcore import cli
from tlcore.config.configuration import check_config
from tlcore.config.table import table
from tlcore.errors import TlcoreError
from tlcore.layout.jsontext import parse_json

MARKER = "<!-- config-table -->"
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# What takes a configuration, a part of one, or any JSON.
CONFIGS = {"--intermediate-log-config", "--additional-config", "-d", "check-config"}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def test_the_guide_has_the_configuration_table_of_the_schema() -> None:
    parts = (EXAMPLES / "configuration.md").read_text(encoding="utf-8").split(MARKER)
    assert len(parts) == 3, f"configuration.md needs the table between two lines {MARKER}"
    advice = "paste the output of `python -m tlcore.config.table` between the markers"
    assert parts[1].strip() == table(), advice


@pytest.mark.parametrize("guide", ["reliability", "security"])
def test_every_row_of_a_table_of_faults_names_a_test_that_exists(guide: str) -> None:
    lines = (EXAMPLES / f"{guide}.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.endswith("| test |")]
    assert len(rows) >= 8
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for row in rows:
        named = re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", row.rsplit(" | ", 1)[1])
        assert named and named[0][0], row
        file = ""
        for given, name in named:
            file = given or file
            folders = ("tests/faults", "tests")
            texts = [tests[path] for path in (ROOT / each / file for each in folders) if path in tests]
            assert any(f"def {name}(" in text for text in texts), f"{file}::{name}"


def test_the_readme_is_short_and_the_index_names_every_guide() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 250
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in [*GUIDES, *EXAMPLES.glob("*.py")]:
        assert f"]({path.name})" in index, f"examples/README.md does not name {path.name}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in anchors, f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_is_valid(page: Path) -> None:
    for block in [] if page.name == "CONTRIBUTING.md" else blocks(page):
        if block.language == "json":
            assert check_config(block.text)[1] == [], str(block)
        elif block.language == "python":
            for name in attributes(block.text, "tlcore"):
                _look_up(name)
        elif block.language == "sh":
            for words in commands(block.text):
                _check_command(words, fails=block.status != 0)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_and_key_in_the_text_is_known(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in SPAN.findall(text.replace("\\|", "|")):
        if span.startswith("tlcore "):
            words = next(iter(commands(span)))
            assert words[1] in {*cli.COMMANDS, "--help", "--version"}, f"{page}: {span}"
            if len(words) > 2:
                _check_command(words)
        elif re.match(r'^"\w+": [^.]+$', span):
            assert check_config("{" + span + "}")[1] == [], f"{page}: {span}"
        elif re.match(r"^tlcore\[\w+\]$", span):
            assert span[7:-1] in _extras(), f"{page}: {span}"
        elif "config '{" in span:
            _check_command(next(iter(commands(span))))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_in_the_text_exists(page: Path) -> None:
    for span in SPAN.findall(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(tlcore|backends|schemas|tests|examples)/[\w/.]*", span):
            assert (ROOT / span).exists(), f"{page}: {span}"


def test_a_word_that_means_nothing_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for first in ("```", "```python never", "```bash"):
        page.write_text(f"{first}\nx\n```\n")
        with pytest.raises(ValueError, match=r"page\.md:1: ```.* is not a kind of block"):
            list(blocks(page))


@pytest.mark.parametrize(
    "line",
    [
        "tlcore lss dumps",
        "A=1 tlcore compare a b --bynorm | head",
        "x --intermediate-log-config '{\"enabld\": true}'",
        "make no-such-target",
        "pip install tlcore[nothing]",
        "tlcore ls x --storage-options '{'",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = (words for words in commands(line) if words != ["head"])
    with pytest.raises((AssertionError, SystemExit, ValueError, TlcoreError)):
        _check_command(words)


def _check_command(words: list[str], fails: bool = False) -> None:
    """What can be said of a command without running it."""
    shown = " ".join(words)
    for flag, value in itertools.pairwise(words):
        if flag == "--storage-options" and "{...}" not in value:
            parse_json(value)
        if flag in CONFIGS and value.startswith("{") and not fails:
            parsed = parse_json(value)
            config = parsed.get("intermediate_log_config", parsed)
            assert check_config(json.dumps(config))[1] == [], shown
    if words[0] == "tlcore":
        cli.parser().parse_args(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), shown
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"tlcore\[(\w+)\]", shown):
            assert extra in _extras(), shown


def _extras() -> list[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]\n", 1)[1].split("\n[", 1)[0]
    return re.findall(r"^(\w+) = \[", section, re.MULTILINE)


def _look_up(name: str) -> None:
    """Follow a dotted name, through modules where needed. Raises AttributeError when it leads nowhere."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            found = importlib.import_module(".".join(parts[:index]))
        else:
            found = getattr(found, part)
