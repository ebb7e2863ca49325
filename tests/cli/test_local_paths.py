"""What is written to a disk alone: a URL there would be a directory called ``s3:``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tlcore.__main__ import main

URL = "s3://key:a-secret@bucket/it"
COMMANDS = {
    "compare": ["a", "b", "--output", URL],
    "stats": ["a", "--html", URL],
    "baseline save": ["a", URL],
    "baseline save statistics": ["a", URL, "--stats"],
    "baseline check": [URL, "a"],
    "baseline junit": ["base", "a", "--junit", URL],
    "baseline summary": ["base", "a", "--summary", URL],
    "replay": ["a", "step_0/x", "--module", "torch.nn:ReLU", "--minimise", URL],
    "explain": ["a", "b", "--model", "m", "--keep", URL],
    "selftest": ["m", "--keep", URL],
}
ACTIONS = {"baseline save statistics": "save", "baseline save": "save"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_url_is_refused_before_anything_is_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [name.partition(" ")[0]]
    if words == ["baseline"]:
        words.append(ACTIONS.get(name, "check"))
    with pytest.raises(SystemExit) as left:
        main([*words, *COMMANDS[name]])
    text = capsys.readouterr().err
    assert left.value.code == 2 and "s3://***@bucket/it is a URL" in text and "a-secret" not in text
    assert list(tmp_path.iterdir()) == []
