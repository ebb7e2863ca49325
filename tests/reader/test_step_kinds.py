"""Records and structures that are alike are looked at once: what is wrong with any is still told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.rewriting import without_checksum
from tlcore.errors import VerifyError
from tlcore.reader import verify
from tlcore.reader.documents import record_problem
from tlcore_backends.safetensors.described import restored

LAYERS = 12
# Of what is not looked at, or is known from the rest, any value will do.
HARMLESS: list[Any] = [{"more": [[[]]]}, {"bytes": "many"}, {"shape": []}]


def captured(directory: Path, **keys: Any) -> tlcore.Run:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(LAYERS)))
    keys = {"backend": "safetensors", "log_step_ids": [], **keys}
    with torch.no_grad(), tlcore.capture(model, output_dir=str(directory), **keys) as capture:
        model(torch.randn(2, 4))
    return tlcore.open_run(capture.url)


def told(run: tlcore.Run) -> str:
    """What `verify` says is wrong with a run."""
    try:
        tlcore.open_run(run.url).verify()
    except VerifyError as error:
        return str(error)
    return ""


def damaged(run: tlcore.Run, change: Callable[[Any], object]) -> str:
    """What is said of a run whose index was changed: the same as if all of its parts are looked at."""
    (index,) = Path(run.url).glob("segments/rank_0_000000*.json")
    document = json.loads(without_checksum(index.read_bytes()))
    change(document)
    lines = ",\n".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in document.items())
    index.write_text("{" + lines + "}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_has_sound_kinds", lambda *given: False)
        expected = told(run)
    assert told(run) == expected
    return expected


def test_what_is_written_anew_without_a_change_is_sound(tmp_path: Path) -> None:
    assert not damaged(captured(tmp_path), lambda document: None)


def test_few_of_them_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counting(node: Any, name: str, *more: Any) -> Any:
        made.append(name)
        return restored(node, name, *more)

    run = captured(tmp_path)
    structures = run.step(0).structures(0)
    monkeypatch.setattr("tlcore_backends.safetensors.stored_structures.restored", counting)
    assert tlcore.open_run(run.url).verify() == len(run.step(0).names)
    # The arguments, and the result, of every module are alike.
    assert 2 <= len(made) < 8 < len(structures)


def test_those_that_tell_more_than_names_are_all_looked_at(tmp_path: Path) -> None:
    run = captured(tmp_path, capture="both")
    source: Any = run.stored.source
    assert source.step_kinds(0, 0) is None
    run.verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.update(type="text"),
        lambda node: node.update(items=[{"tensor": "outputs_of_nobody"}]),
        lambda node: node.update(items=[{"tensor": 5}]),
        lambda node: node.update(items=[{"?": 0}]),
        lambda node: node.update(items=[{"type": "float", "value": "1"}]),
        lambda node: node.update(items=[{"type": "tensor", "shape": "x"}]),
        lambda node: node.clear(),
    ],
)
@pytest.mark.parametrize("place", [0, 7, -1])
def test_one_that_is_damaged_is_told_of(
    tmp_path: Path, place: int, change: Callable[[dict[str, Any]], None]
) -> None:
    run = captured(tmp_path)
    arguments = [name for name in run.step(0).structures(0) if name.endswith("/inputs.json")]

    def damage(document: Any) -> None:
        by_name = dict(document["structures"])
        change(by_name[arguments[place]])
        document["structures"] = [[name, node] for name, node in by_name.items()]

    assert damaged(run, damage)


def test_one_that_is_missing_is_told_of(tmp_path: Path) -> None:
    run = captured(tmp_path)

    def damage(document: Any) -> None:
        (plan,) = document["plans"]
        assert plan["structures"][1] == len(document["structures"])
        plan["structures"][1] -= 1

    assert damaged(run, damage)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../outputs_cpu"},
        {"name": "a/b/outputs_cpu"},
        {"name": "0.0\x1b/outputs_cpu"},
        {"name": 5},
        {"module": 5},
        {"module": None},
        {"call": -1},
        {"call": True},
        {"direction": "sideways"},
        {"direction": ["outputs"]},
        {"path": "x"},
        {"path": [[0]]},
        {"dtype": "float33"},
        {"dtype": "int32"},
        {"shape": [None, -4]},
        {"shape": [None, 4, 2]},
        {"shape": []},
        {"device": 1},
        {"bytes": "many"},
        {"offset": 3},
        {"offset": 1 << 49},
        {"file": 1},
        {"hashes": "AAAA"},
        {"hashes": ""},
        {"same_as": 10_000},
        {"more": [[[]]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_record_that_is_damaged_is_told_of(tmp_path: Path, place: int, change: dict[str, Any]) -> None:
    said = damaged(captured(tmp_path), lambda document: own(document, place).update(change))
    assert said or change in HARMLESS


def own(document: Any, place: int) -> Any:
    """The entry of an array that has bytes of its own."""
    return [entry for entry in document["arrays"] if "hashes" in entry][place]


def test_few_records_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def counting(record: Any, number: int) -> str | None:
        looked.append(record["name"])
        return record_problem(record, number)

    run = captured(tmp_path)
    monkeypatch.setattr("tlcore.reader.sound_records.record_problem", counting)
    assert tlcore.open_run(run.url).verify() == len(run.step(0).names)
    assert 2 <= len(looked) < 10 < len(run.step(0).names)
