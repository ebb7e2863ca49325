"""`tlcore prune`: what it takes, what it leaves, and that it asks."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.toys import model
from tlcore.__main__ import main
from tlcore.reader.run import Run
from tlcore.reader.step import Step
from tlcore.runs.prune import plan

# No process has such a high id.
DEAD = 2**22 + 1
OLD, NEW = "2024-01-01T00:00:00+00:00", "2024-03-01T00:00:00+00:00"


def captured(directory: Path, created: str = OLD, backend: str = "pt", **document: Any) -> Path:
    """A run of one step whose ``run.json`` then says something else."""
    with tlcore.capture(
        model(), module_call_match=".", output_dir=str(directory), backend=backend
    ) as capture:
        capture._model(torch.ones(2, 4))
    path = Path(capture.url)
    stated = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**stated, "created": created, **document}))
    return path


def left(directory: Path) -> set[Path]:
    return set(directory.iterdir())


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_by_age(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = captured(tmp_path, OLD, backend)
    new = captured(tmp_path, time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), backend)
    assert main(["prune", str(tmp_path), "--older-than", "1d", "--yes"]) == 0
    assert left(tmp_path) == {new}
    assert f"removed {old}" in capsys.readouterr().out
    assert tlcore.open_run(new).verify() > 0


def test_by_size_the_oldest_go_first(tmp_path: Path) -> None:
    first, second = captured(tmp_path, OLD), captured(tmp_path, NEW)
    size = sum(f.stat().st_size for f in second.rglob("*") if f.is_file() and f.stat().st_nlink == 1)
    assert [c.path for c in plan(tmp_path, max_total=0).remove] == [str(first), str(second)]
    assert [c.path for c in plan(tmp_path, max_total=int(2.5 * size)).remove] == [str(first)]
    assert plan(tmp_path, max_total=1 << 40).remove == []
    assert main(["prune", str(tmp_path), "--max-total", f"{2 * size}", "--older-than", "1w", "--yes"]) == 0
    assert left(tmp_path) == {second}


def test_incomplete_runs_but_never_one_that_may_be_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = captured(tmp_path)
    crashed = captured(tmp_path, state="running", pid=DEAD)
    alive = captured(tmp_path, state="running", pid=os.getpid())
    elsewhere = captured(tmp_path, state="running", host="another-host")
    assert main(["prune", str(tmp_path), "--incomplete", "--yes"]) == 0
    # The one elsewhere committed its step a moment ago.
    assert left(tmp_path) == {complete, alive, elsewhere}
    said = capsys.readouterr().out
    assert f"removed {crashed}" in said
    assert said.count("it may be running") == 2
    step = elsewhere / "step_0/step.json"
    step.write_text(json.dumps({**json.loads(step.read_text()), "ended": OLD}))
    assert main(["prune", str(tmp_path), "--incomplete", "--yes"]) == 0
    assert left(tmp_path) == {complete, alive}


def committed(run: Path, step: int, ended: str, rank: int = 0) -> None:
    """One more step of a run, as a rank commits it."""
    document = json.loads((run / "step_0/step.json").read_text())
    directory = run / f"step_{step}"
    directory.mkdir(exist_ok=True)
    file = directory / ("step.json" if rank == 0 else f"step_rank_{rank}.json")
    file.write_text(json.dumps({**document, "step": step, "records": [], "ended": ended}))


def ended(run: Path, when: str) -> None:
    file = run / "step_0/step.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ended": when}))


def now() -> str:
    return datetime.now(timezone.utc).isoformat()


@pytest.mark.parametrize("criterion", [{"incomplete": True}, {"max_total": 0}])
@pytest.mark.parametrize("state", ["running", "complete"])
def test_of_several_ranks_a_dead_process_proves_nothing(
    state: str, criterion: dict[str, Any], tmp_path: Path
) -> None:
    run = captured(tmp_path, state=state, pid=DEAD, world_size=2)
    # Rank 0 stopped long ago, rank 1 is at work.
    ended(run, OLD)
    committed(run, 0, now(), rank=1)
    found = plan(tmp_path, **criterion)
    assert (found.remove, [each.path for each in found.running]) == ([], [str(run)])
    committed(run, 0, OLD, rank=1)
    found = plan(tmp_path, **criterion)
    assert ([each.path for each in found.remove], found.running) == ([str(run)], [])


def test_of_one_rank_a_dead_process_is_enough(tmp_path: Path) -> None:
    run = captured(tmp_path, now(), state="running", pid=DEAD)
    assert [each.path for each in plan(tmp_path, incomplete=True).remove] == [str(run)]


def test_a_step_that_is_being_written_hides_none_before_it(tmp_path: Path) -> None:
    run = captured(tmp_path, state="running", host="another-host")
    (run / "step_1/0").mkdir(parents=True)
    (run / "step_1/0/inputs.json").write_text("{}")
    assert plan(tmp_path, incomplete=True).remove == []
    ended(run, OLD)
    assert [each.path for each in plan(tmp_path, incomplete=True).remove] == [str(run)]


def test_a_damaged_step_hides_none_before_it(tmp_path: Path) -> None:
    run = captured(tmp_path, state="complete", pid=DEAD, world_size=2)
    ended(run, OLD)
    committed(run, 0, now(), rank=1)
    (run / "step_1").mkdir()
    (run / "step_1/step.json").write_text("{")
    assert [each.path for each in plan(tmp_path, incomplete=True).running] == [str(run)]


def test_a_run_that_somebody_else_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, crashed = (captured(tmp_path, created, state="running", pid=DEAD) for created in (OLD, NEW))

    def look(path: str, options: Any) -> int:
        if path == str(gone):
            shutil.rmtree(gone)
        return 1

    monkeypatch.setattr("tlcore.runs.prune.stored_bytes", look)
    assert [each.path for each in plan(tmp_path, incomplete=True).remove] == [str(crashed)]


def test_ranks_count_their_steps_by_themselves(tmp_path: Path) -> None:
    run = captured(tmp_path, state="running", pid=DEAD, world_size=2)
    ended(run, OLD)
    committed(run, 7, OLD)
    committed(run, 3, now(), rank=1)
    assert plan(tmp_path, incomplete=True).remove == []


def test_of_a_long_run_only_the_last_steps_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tlcore.capture(
        model(),
        module_call_match=".",
        output_dir=str(tmp_path),
        backend={"name": "safetensors", "commit_s": 100},
        log_step_ids=[],
    ) as capture:
        for _ in range(40):
            capture._model(torch.ones(2, 4))
    run = Path(capture.url)
    stated = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**stated, "created": OLD, "state": "running", "host": "other"}))
    opened: list[int] = []
    step = Run.step

    def count(self: Run, number: int) -> Step:
        opened.append(number)
        return step(self, number)

    monkeypatch.setattr(Run, "step", count)
    assert plan(tmp_path, incomplete=True).remove == []
    assert opened == [39]


def test_it_asks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = captured(tmp_path)
    assert main(["prune", str(tmp_path), "--older-than", "1d"]) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, status in (("n", 1), ("", 1), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert left(tmp_path) == {old}
        assert main(["prune", str(tmp_path), "--older-than", "1d", "--dry-run"]) == 0
        assert main(["prune", str(tmp_path), "--older-than", "1d"]) == status
    assert left(tmp_path) == set()


def test_only_runs_are_touched(tmp_path: Path) -> None:
    run = captured(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "file").write_text("mine")
    (run / "step_0/link").symlink_to(outside)
    elsewhere = captured(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(elsewhere)
    assert main(["prune", str(tmp_path), "--older-than", "1s", "--yes"]) == 0
    assert {path.name for path in left(tmp_path)} == {"notes.txt", "other", "elsewhere", "linked"}
    assert tlcore.open_run(elsewhere).verify() == 6
    assert (outside / "file").read_text() == "mine"


def test_unfinished_files_of_crashed_writers(tmp_path: Path) -> None:
    run = captured(tmp_path)
    day_ago = time.time() - 2 * 86400
    crashed, fresh, foreign = (
        run / "step_0" / name for name in ("a.pt.0123abcd-7.tmp", "b.pt.0123abcd-8.tmp", "mine.tmp")
    )
    for path in (crashed, fresh, foreign):
        path.write_bytes(b"half")
    for path in (crashed, foreign):
        os.utime(path, (day_ago, day_ago))
    assert main(["prune", str(tmp_path), "--uploads", "--yes"]) == 0
    assert not crashed.exists() and fresh.exists() and foreign.exists()
    assert tlcore.open_run(run).verify() == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs --older-than, --max-total, --incomplete or --uploads"),
        (["--older-than", "soon"], "is no age"),
        (["--max-total", "much"], "is no size"),
    ],
)
def test_bad_arguments(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(["prune", str(tmp_path), *arguments]))
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_removal_that_is_cut_short_leaves_a_run_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcore_backends.storage.local import LocalStore

    run = captured(tmp_path)
    original = LocalStore.delete
    deleted: list[str] = []

    def fails_later(self: LocalStore, name: str) -> None:
        if len(deleted) == 4:
            raise tlcore.BackendError("interrupted")
        deleted.append(name)
        original(self, name)

    monkeypatch.setattr(LocalStore, "delete", fails_later)
    assert main(["prune", str(tmp_path), "--older-than", "1d", "--yes"]) == 1
    opened = tlcore.open_run(run)
    assert opened.steps == [] and opened.incomplete_steps == [0]
    monkeypatch.undo()
    assert main(["prune", str(tmp_path), "--older-than", "1d", "--yes"]) == 0
    assert left(tmp_path) == set()


def test_runs_at_a_url(tmp_path: Path) -> None:
    import fsspec

    with tlcore.capture(
        nn.Sequential(nn.Linear(2, 2)), module_call_match=".", output_dir="memory://prune/runs"
    ) as capture:
        capture._model(torch.ones(1, 2))
    assert len(plan("memory://prune/runs", max_total=0).remove) == 1
    assert main(["prune", "memory://prune/runs", "--max-total", "0", "--yes"]) == 0
    assert fsspec.filesystem("memory").find("/prune") == []
    assert main(["prune", "memory://prune/runs", "--max-total", "0", "--yes"]) == 0
