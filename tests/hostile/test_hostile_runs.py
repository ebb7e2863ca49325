"""Runs made by an attacker: refused with a clear error, nothing run, nothing written, memory bounded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.files import (
    TENSOR,
    Edit,
    as_text,
    deep,
    deep_structure,
    edit,
    hostile,
    in_place_of,
    in_record,
    in_run,
    in_step,
    in_structure,
    snapshot,
    sound,
)
from tests.reading import read_all, run_commands

pytestmark = pytest.mark.slow

__all__ = ["hostile", "sound"]

NAMES = [
    "../../../outside/x",
    "/etc/x",
    "step_0/../../outside",
    f"{TENSOR}\0",
    "step_0/a/\x1b[2Jx",
    "step_1/a/b",
]
STEERS = "\x1b[2J\x07<script>alert(1)</script>\r\n|`x`[a](javascript:b)"
NOTHING = {"type": "tuple", "items": []}
FIFO = in_place_of("step_0/step.json", os.mkfifo)


def steering(document: Any) -> None:
    for each in document["records"]:
        each.update(module=STEERS, device=STEERS)


RUN_IDS = ["../evil", "/a", ".", "", "a/b"]

# What is done to the run, and what some reader must say about it.
ATTACKS: dict[str, tuple[Edit, str]] = {
    **{f"run id {name!r}": (in_run(run_id=name), "cannot be a run's id") for name in RUN_IDS},
    **{
        f"record named {name!r}": (in_record(name=name), "not a valid name of a tensor of step 0")
        for name in NAMES
    },
    "record's file elsewhere": (in_record(file="../../outside/secret"), "not a valid name of the file"),
    "call outside": (in_step(calls=["../../outside"]), "is no call"),
    "structure outside": (in_step(structures={"../../x/inputs.json": {}}), "damaged structures"),
    "newer run": (in_run(layout=9), "layout version 9, this tlcore reads up to 2; a newer tlcore is needed"),
    "newer step": (
        in_step(layout=9),
        "layout version 9, this tlcore reads up to 2; a newer tlcore is needed",
    ),
    "layout zero": (in_run(layout=0), "the first one is 1"),
    "huge layout": (in_run(layout=10**4000), "a newer tlcore is needed"),
    "a billion ranks": (in_run(world_size=10**9), "world_size is 1000000000"),
    "many ranks": (in_run(world_size=10**6), ""),
    "no ranks": (in_run(world_size=-1), "world_size is -1"),
    "rank is true": (in_run(world_size=True), "world_size is True"),
    "deep run file": (in_run(config={"x": deep(900)}), "nested too deep"),
    "deeper run file": (as_text("run.json", "[" * 100_000), "nested too deep"),
    "deep step": (in_step(extra=deep(900)), "nested too deep"),
    "deep record": (in_record(extra=deep(900)), "nested too deep"),
    "deep structure": (in_structure(deep_structure(450)), "nested too deep"),
    "structure is a list": (in_structure([]), "not a tensor structure"),
    "unknown node": (in_structure({"type": "pickle"}), "not a tensor structure"),
    "items are no list": (in_structure({"type": "list", "items": 3}), "not a tensor structure"),
    "keywords inside": (
        in_structure({"type": "tuple", "items": [{**NOTHING, "kwargs": 3}]}),
        "not a tensor structure",
    ),
    "keywords are a list": (
        in_structure({**NOTHING, "kwargs": {"type": "list", "items": [{"type": "none"}]}}),
        "",
    ),
    "fields run code": (
        in_structure({"type": "tuple", "items": [{"type": "none"}], "fields": ["__import__('os')"]}),
        "",
    ),
    "huge float": (in_structure({"type": "float", "value": 10**400}), "not a tensor structure"),
    "huge shape": (in_record(shape=[1 << 40, 1 << 40]), "makes no sense|are not those|holds"),
    "many dimensions": (in_record(shape=[1] * 10_000), "'shape' of"),
    "shape of texts": (in_record(shape=["2", 3]), "'shape' of"),
    "huge numbers": (in_record(bytes=10**4000), "'bytes' of"),
    "negative size": (in_record(bytes=-1), "'bytes' of"),
    "direction unknown": (in_record(direction=[]), "'direction' of"),
    "ledger of texts": (in_step(ledger={"captured": "many"}), "damaged ledger"),
    "infinite ledger": (as_text("step_0/step.json", '{"ledger": {"captured": Infinity}}'), "not JSON"),
    "reasons of texts": (in_step(ledger={"reasons": {"a": "b"}}), "damaged ledger"),
    "records is an object": (in_step(records={}), "'records' is missing"),
    "rows of numbers": (in_step(rows=[1]), "damaged rows"),
    "rows without fields": (in_step(rows=[{}]), "damaged rows"),
    "huge rows": (
        in_step(rows=[{"request_id": "a", "first_row": 1 << 80, "rows": 1 << 80, "first_position": -5}]),
        "damaged rows",
    ),
    "texts that steer a terminal": (
        edit("step_0/step.json", steering),
        "",
    ),
    "a date that steers a terminal": (in_run(created=STEERS), ""),
    "shards is a number": (in_step(shards=3), "list of shards"),
    "shards of numbers": (in_step(shards=[3, {}, {"file": 3}]), "list of shards"),
    "run file is an array": (as_text("run.json", "[]"), "not written by tlcore"),
    "not UTF-8": (in_place_of("run.json", lambda path: path.write_bytes(b'{"layout": "\xff"}')), "not JSON"),
    "huge number": (as_text("run.json", '{"layout": ' + "9" * 5000 + "}"), "not JSON"),
    "pipe for a step": (FIFO, ""),
    "pipe for the run file": (in_place_of("run.json", os.mkfifo), "not a regular file"),
    "device for the run file": (
        in_place_of("run.json", lambda path: os.symlink("/dev/zero", path)),
        "leads out of",
    ),
    "run file is a link outside": (
        in_place_of("run.json", lambda path: os.symlink("../../outside/secret", path)),
        "leads out of",
    ),
    "run file links to itself": (
        in_place_of("run.json", lambda path: os.symlink(path, path)),
        "run.json|symbolic",
    ),
    "run file is a directory": (in_place_of("run.json", Path.mkdir), "not a regular file|directory"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_run_is_refused_by_every_reader(
    hostile: Path, sound: dict[str, Path], attack: str, tmp_path: Path
) -> None:
    spoil, message = ATTACKS[attack]
    spoil(hostile)
    before = snapshot(tmp_path)
    said = read_all(hostile)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # Drawing takes long, and is reached only where the run can be opened.
    printed = run_commands(hostile, sound["pt"], scratch, html=not message)
    everything = "\n".join(said) + "\n".join(text for _, text in printed.values())
    assert re.search(message, everything), everything[:3000]
    assert "hunter2" not in everything
    report = scratch / "r.html"
    assert (
        "<script>alert"
        not in (report.read_text() if report.exists() else "") + printed["compare markdown"][1]
    )
    assert len(everything) < 200_000
    assert snapshot(tmp_path) == before, "something was written outside"
