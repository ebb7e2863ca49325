"""The texts of tokens along a map: what each adds, from any tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny_llama
from tlcore.__main__ import main
from tlcore.analysis.report.tokens import load_tokenizer, texts_of
from tlcore.errors import ConfigError

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def directory() -> Path:
    pytest.importorskip("transformers")
    return tiny_llama()


def test_the_texts_together_are_the_text(directory: Path) -> None:
    text = "the fox\n東京 naïve\tjumps"
    for path in (directory, directory / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        ids = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
        found = texts_of(dict(enumerate(ids)), tokenizer)
        assert list(found) == list(range(len(ids)))
        assert "".join(found.values()).replace("⋯", "") == "the·fox↵東京·naïve⇥jumps"
        # A character of three bytes, each a token here, stands at the last of them.
        assert [found[at] for at in range(len(ids)) if found[at] in "東⋯"][:3] == ["⋯", "⋯", "東"]


def test_a_tokenizer_that_strips_the_first_space_keeps_those_between() -> None:
    metaspace = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<s>": 3}, unk_token="c")
    )
    metaspace.decoder = tokenizers.decoders.Metaspace()
    assert texts_of({4: 0, 5: 1, 6: 2}, metaspace) == {4: "a", 5: "·b", 6: "c"}


def test_what_is_half_a_character_goes_by_its_name(directory: Path) -> None:
    tokenizer = load_tokenizer(str(directory))
    ids = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode("東 a").ids
    # The position between is not known.
    assert "⋯" not in (found := texts_of({0: ids[0], 2: ids[-1]}, tokenizer))[0] and found[0]


def test_a_mistake_is_answered_before_the_work(directory: Path, tmp_path: Path) -> None:
    for path, problem in (("nowhere", "is not there"), (tmp_path, "cannot be read")):
        with pytest.raises(ConfigError, match=f"--tokenizer.*{problem}"):
            load_tokenizer(str(path))


def test_the_option_is_told_where_nothing_would_show_it(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "a", "b", "--tokenizer", str(directory), "--format", "json"]) == 2
    assert "only --format html" in capsys.readouterr().err
