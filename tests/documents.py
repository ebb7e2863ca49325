"""The README and the guides as blocks of commands and snippets, which can be checked and run.

``python -m tests.documents NEEDS FILE...`` runs the blocks of these files that need NEEDS, in this process
and in the current directory.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"
GUIDES = sorted(path for path in EXAMPLES.glob("*.md") if path.name != "README.md")
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(EXAMPLES.rglob("*.md"))]
# What a block may need beside this package; "checked" blocks cannot run as they stand.
NEEDS = {"", "vllm", "server", "s3", "checked"}
LANGUAGES = {"python", "sh", "json", "text"}
_FENCE = re.compile(r"^```(.*)$")
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
# Assignments reach the blocks that follow.
_SHELL = "set -ae\ntrap 'status=$?; env -0 > \"$ENVIRONMENT_FILE\"; exit $status' EXIT\n"


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, its language, what it needs, and the exit status it promises."""

    path: Path
    line: int
    language: str
    needs: str
    status: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page. Raises ValueError for words after a fence that mean nothing."""
    start, words, lines = 0, [""], list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence is None:
            lines.append(line)
        elif not start:
            start, words, lines = number, fence.group(1).split(), []
        else:
            yield _block(path, start, words, "\n".join(lines) + "\n")
            start = 0
    if start:
        raise ValueError(f"{path}:{start}: the block has no end")


def _block(path: Path, line: int, words: Sequence[str], text: str) -> Block:
    language, needs, status = (words or [""])[0], "", 0
    for word in words[1:]:
        if word.startswith("status="):
            status = int(word.removeprefix("status="))
        else:
            needs = word
    if language not in LANGUAGES or needs not in NEEDS:
        raise ValueError(f"{path}:{line}: ```{' '.join(words)} is not a kind of block that is tested")
    return Block(path, line, language, needs, status, text)


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell text as lists of words; assignments before them are left out."""
    for inner in _SUBSTITUTION.findall(text):
        yield from commands(inner)
    text = _SUBSTITUTION.sub("SUBSTITUTED", text)
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;()"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"^\w+=", word):
                words.append(word)


@dataclass
class Session:
    """A directory in which the blocks of a page run one after another, as a reader would type them."""

    directory: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "guide"})

    def __post_init__(self) -> None:
        if not (self.directory / "examples").exists():
            (self.directory / "examples").symlink_to(EXAMPLES)
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"

    def run(self, block: Block) -> str:
        """Run a block; returns what a shell block printed. Snippets run in this process's directory."""
        if block.language == "python":
            # The lines of a traceback are those of the page.
            code = compile("\n" * block.line + block.text, str(block.path), "exec")
            exec(code, self.names)
            return ""
        return self._shell(block)

    def _shell(self, block: Block) -> str:
        after, output = self.directory / ".environment", self.directory / ".output"
        with output.open("wb") as file:
            # Into a file: what stays in the background would keep a pipe open.
            done = subprocess.run(
                ["bash", "-c", _SHELL + block.text],
                cwd=self.directory,
                env={**self.environment, "ENVIRONMENT_FILE": str(after)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=600,
                check=False,
            )
        shown = output.read_text(encoding="utf-8", errors="replace")
        assert done.returncode == block.status, f"{block} ended with {done.returncode}:\n{shown}"
        pairs = (entry.partition("=") for entry in after.read_text().split("\0") if entry)
        self.environment = {name: value for name, _, value in pairs}
        return shown


def attributes(text: str, module: str) -> set[str]:
    """The dotted names below a module that a Python text uses, such as ``tlcore.vllm.attach``."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] == module:
            name = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", name):
                found.add(name)
    return found


def main(argv: Sequence[str]) -> None:
    """Run the blocks of some pages that need the same, all in one session."""
    needs, *paths = argv
    session = Session(Path.cwd())
    for path in paths:
        for block in blocks(Path(path)):
            if block.needs == needs:
                sys.stdout.write(f"--- {block}\n{session.run(block)}")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
