"""Rows in files of their own, read together: whatever lies there, they are those of each step by itself."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deep import scaled
from tests.ranked import Rows, requests_run
from tlcore.errors import ReadError
from tlcore.hotpath import rows as hotpath_rows
from tlcore.reader import Run, open_run
from tlcore.reader.alike import AlikeTensors
from tlcore.reader.dataset import wanted

IDS = [f"r{number}-{number:08x}" for number in range(3)]
STEPS: list[Rows] = [
    [(each, 4, 0) for each in IDS],
    *([(each, 1, 4 + at) for each in IDS] for at in range(7)),
]
NAMES = ["a/outputs", "b/outputs"]
READ_ROWS = "tlcore_backends.pt.source.read_rows"


def _served(path: Path, modules: Sequence[str] = ("a", "b"), **keys: Any) -> Run:
    values = torch.Generator().manual_seed(0)

    def tensors(step: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        count = sum(row["rows"] for row in rows)
        return {name: torch.randn(count, 2, 6, generator=values) for name in modules}

    def extra(step: int) -> dict[str, Any]:
        told = [
            {"request_id": request, "prompt": 4, "first_position": first, "ids": list(range(count))}
            for request, count, first in STEPS[step]
        ]
        return {"tokens": told}

    return requests_run(path, STEPS, tensors, extra=extra, **keys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(_served(tmp_path_factory.mktemp("run")).url)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / whole.name)
    return tmp_path / whole.name


def _content(path: Path, names: Sequence[str]) -> Any:
    """All that a data set has, in another order than it lies in; or what is said in its stead."""
    try:
        data = open_run(str(path)).dataset(names)
        order = random.Random(1).sample(range(len(data)), len(data))
        items = data.__getitems__(order)
        return data.fingerprint, [{name: each.tolist() for name, each in item.items()} for item in items]
    except ReadError as error:
        return str(error)


def _both(path: Path, monkeypatch: pytest.MonkeyPatch, names: Sequence[str] = NAMES) -> tuple[Any, Any]:
    """The same, and what looking at each step by itself and reading tensor by tensor gives."""
    together = _content(path, names)
    with monkeypatch.context() as patch:
        patch.setattr(wanted, "has_outlines", lambda stored: False)
        patch.setattr(AlikeTensors, "are_found", False)
        patch.setattr(AlikeTensors, "are_read_together", False)
        return together, _content(path, names)


def _all_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many files each call is given, and how many of them it reads."""
    calls: list[tuple[int, int]] = []

    def noted(*given: Any) -> bytes:
        read = hotpath_rows.read_rows(*given)
        calls.append((len(given[1]), sum(read)))
        return read

    with monkeypatch.context() as patch:
        patch.setattr(READ_ROWS, noted)
        assert not isinstance(_content(path, NAMES), str)
    return calls


def test_files_of_steps_that_are_alike_are_read_in_one_call(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = _both(whole, monkeypatch)
    assert one == other and len(one[1]) == sum(count for step in STEPS for _, count, _ in step)
    # Of each tensor the prompt's file, and the seven of decode steps.
    assert sorted(_all_read(whole, monkeypatch)) == [(1, 1), (1, 1), (7, 7), (7, 7)]
    with monkeypatch.context() as patch:
        patch.setattr(READ_ROWS, hotpath_rows._read_rows)
        assert _content(whole, NAMES) == one


def _cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-300])


def _of_torch(file: Path) -> None:
    """The same tensor in an archive of another size."""
    tensor = torch.load(file)
    file.unlink()
    torch.save(tensor, file)


def _of_another(file: Path) -> None:
    torch.save(torch.load(file).double(), file)


def _linked(file: Path) -> None:
    file.rename(file.with_name("there"))
    file.symlink_to("there")


@pytest.mark.parametrize(
    ("change", "is_read"),
    [(_cut_off, False), (_of_torch, False), (_of_another, False), (_linked, True), (os.unlink, False)],
)
def test_a_file_that_is_not_as_it_was_written_is_read_as_ever_or_refused(
    change: Callable[[Path], None], is_read: bool, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _content(copied, NAMES)
    change(copied / "step_4" / "b" / "outputs_cpu.pt")
    one, other = _both(copied, monkeypatch)
    assert one == other
    assert one == before if is_read else "step_4/b/outputs_cpu" in one


def _number(text: str, draw: random.Random) -> str:
    """Another number, of the rows mostly."""
    begin = text.rindex('"rows"')
    found = draw.choice([*re.finditer(r"(?<=:)-?\d+(?=[,}])", text[begin:])])
    value = draw.choice([0, 1, 2, 5, -1, 1 << 40, 1 << 70, 1.5, "true", '"1"'])
    return f"{text[: begin + found.start()]}{value}{text[begin + found.end() :]}"


def _string(text: str, draw: random.Random) -> str:
    found = draw.choice([*re.finditer(r'(?<=")[a-z_0-9/.-]+(?=")', text)])
    return (
        text[: found.start()]
        + draw.choice(["a", "", "step_4/", "é", "\\u0041", "x:1,y"])
        + text[found.end() :]
    )


def _byte(text: str, draw: random.Random) -> str:
    at = draw.randrange(len(text))
    return text[:at] + draw.choice('0a{}[],:"\\ ') + text[at + 1 :]


def _blanks(text: str, draw: random.Random) -> str:
    return json.dumps(json.loads(text), indent=draw.choice([None, 1]))


def _dropped(text: str, draw: random.Random) -> str:
    document = json.loads(text)
    inner = draw.choice([document, document["records"][0], document["rows"][0], document["tokens"][-1]])
    del inner[draw.choice(sorted(inner))]
    return json.dumps(document, separators=(",", ":"))


CHANGES = [_number, _string, _byte, _blanks, _dropped]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_documents_that_somebody_has_changed_mean_what_they_do_alone(
    change: Callable[[str, random.Random], str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checksum, as other programs write them: nothing is seen but what stands there."""
    names = [copied / f"step_{step}" / "step.json" for step in range(len(STEPS))]
    texts = [re.sub(r'"checksum":"[^"]*",\s*', "", name.read_text()) for name in names]
    for seed in range(scaled(40, 300)):
        draw = random.Random(seed)
        for name, text in zip(names, texts, strict=True):
            name.write_text(text)
        for chosen in draw.sample(range(len(STEPS)), draw.choice([1, 1, 2, 8])):
            # Of several steps the same is changed, so that they may be alike.
            names[chosen].write_text(change(texts[chosen], random.Random(seed)))
        one, other = _both(copied, monkeypatch)
        assert one == other, seed


def test_a_document_of_another_step_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(copied / "step_3" / "step.json", copied / "step_5" / "step.json")
    one, other = _both(copied, monkeypatch)
    assert one == other and "is not a valid name of a tensor of step 5" in one


def test_a_changed_document_with_its_checksum_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = copied / "step_5" / "step.json"
    name.write_text(name.read_text().replace('"first_position":8', '"first_position":9', 1))
    one, other = _both(copied, monkeypatch)
    assert one == other and "step_5/step.json: damaged, it was changed since" in one


def test_modules_may_be_called_like_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = ["step_2", "step_3", 'a"b', "é"]
    path = Path(_served(tmp_path, modules).url)
    named = [next((path / "step_3").glob(f"{begin}*")).name for begin in ("step_2", "step_3", "a%", "%")]
    one, other = _both(path, monkeypatch, [f"{name}/outputs" for name in named])
    assert one == other and len(one[1]) == sum(count for step in STEPS for _, count, _ in step)


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn", "bfloat16"])
def test_converted_rows_are_what_each_step_gives(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _served(tmp_path, store_dtype=stored)
    one, other = _both(Path(run.url), monkeypatch)
    assert one == other and not isinstance(one, str)
    data = run.dataset(NAMES, per="request")
    for request, item in zip(data.requests, data, strict=True):
        for name in NAMES:
            torch.testing.assert_close(item[name], run.request(request)[f"{name}_cpu"], rtol=0, atol=0)
