"""Steps that are alike are converted as a whole: what comes out is what comes of reading each by itself."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.rewriting import without_checksum
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.errors import BackendError, ReadError, VerifyError
from tlcore.layout.checksums import digest_of_files, with_checksum
from tlcore.layout.templates import compact
from tlcore.reader.alike import alike_steps
from tlcore.runs import conversion
from tlcore.runs.convert import convert
from tlcore_backends.pt import alike
from tlcore_backends.pt import alike_steps as tree_steps
from tlcore_backends.safetensors import alike_steps as segment_steps
from tlcore_backends.storage.local import LocalStore
from tlcore_backends.storage.unfinished_folder import UnfinishedFolder

Counts = dict[bool, int]


class Model(nn.Module):
    """A module called twice, an alias, a structure without tensors, and numbers in structures."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu, self.part = nn.Linear(4, 4), nn.ReLU(), Part()
        self.small = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        self.small(x)
        return torch.add(self.relu(self.relu(input=self.linear(x)).to(torch.bfloat16)), self.part(x, scale))


class Part(nn.Module):
    """Hands its input on, and takes a number."""

    def forward(self, x: torch.Tensor, scale: int) -> torch.Tensor:
        return x


def capture(
    output_dir: Path, backend: Any, steps: int = 5, changes: Callable[[int], Any] = lambda _: 1
) -> Path:
    torch.manual_seed(0)
    model = Model()
    keys: dict[str, Any] = {"log_step_ids": [], "max_tensor_size": 30}
    with tlcore.capture(model, output_dir=str(output_dir), backend=backend, **keys) as captured:
        for step in range(steps):
            # One is too large now and then, and is skipped: a step of another kind.
            model(torch.randn(3 + 7 * (step % 3 == 2), 4), changes(step))
    return Path(captured.url)


@pytest.fixture(autouse=True)
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a step are those of several threads, however few they are."""
    monkeypatch.setattr(alike, "_LEAST_OF_PART", 1)
    monkeypatch.setattr(tree_steps, "_THREADS", 3)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How many steps were written as a whole, and how many should have been and were not."""
    found: Counts = {True: 0, False: 0}
    plain = conversion._Steps._write_alike

    def counting(self: Any, sink: Any, step: Any) -> bool:
        done = plain(self, sink, step)
        found[done] += 1
        return done

    monkeypatch.setattr(conversion._Steps, "_write_alike", counting)
    return found


def converted(source: Path, target: Path, backend: Any) -> Path:
    return Path(convert(tlcore.open_run(source), load_config(output_dir=str(target), backend=backend)))


def files(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def links(run: Path) -> set[frozenset[str]]:
    """The names of each file."""
    found: dict[int, set[str]] = {}
    for file in run.rglob("*"):
        if file.is_file():
            found.setdefault(file.stat().st_ino, set()).add(str(file.relative_to(run)))
    return set(map(frozenset, found.values()))


def one_by_one(monkeypatch: pytest.MonkeyPatch, *call: Any) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "alike_steps", lambda stored, rank: iter(()))
        return converted(*call)


@pytest.mark.parametrize("other", ["pt", "safetensors"])
@pytest.mark.parametrize("own", ["pt", "safetensors"])
def test_what_comes_out_is_the_same(
    tmp_path: Path, own: str, other: str, written: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = capture(tmp_path / "a", own, steps=8)
    # Who says when segments end does not get those that there are.
    backend: Any = {"name": other, "commit_s": 600} if other == "safetensors" else other
    whole = converted(source, tmp_path / "b", backend)
    # Of two kinds, each but the first step.
    assert written == {True: 6, False: 0}
    single = one_by_one(monkeypatch, source, tmp_path / "c", backend)
    assert written == {True: 6, False: 0}
    if other == "safetensors":
        # Where segments end depends on time; what is in them does not.
        whole, single = (one_by_one(monkeypatch, run, run.parent / "d", "pt") for run in (whole, single))
    assert files(whole) == files(single)
    assert links(whole) == links(single)
    assert tlcore.open_run(whole).verify() == tlcore.open_run(source).verify() > 50


def test_numbers_in_structures_make_steps_of_their_own(tmp_path: Path, written: Counts) -> None:
    for own in ("pt", "safetensors"):
        source = capture(tmp_path / own, own, changes=lambda step: step)
        there = converted(source, tmp_path / f"{own}-there", "pt")
        assert written == {True: 0, False: 0}
        found = [tlcore.open_run(there).json(f"step_{step}/part/inputs.json") for step in range(5)]
        of_source = tlcore.open_run(source)
        assert found == [of_source.json(f"step_{step}/part/inputs.json") for step in range(5)]
        assert len(set(map(str, found))) == 5


def test_steps_of_several_segments_are_alike(tmp_path: Path, written: Counts) -> None:
    backend: Any = {"name": "safetensors", "commit_s": 0}
    source = capture(tmp_path / "a", backend, steps=7)
    assert len([*source.glob("segments/*.safetensors")]) == 7
    assert files(converted(source, tmp_path / "b", "pt"))
    assert written == {True: 5, False: 0}


Change = Callable[[Path], None]


def _payload(run: Path) -> None:
    file = run / "step_4/linear/outputs_cpu.pt"
    data = bytearray(file.read_bytes())
    tensor = torch.load(file)
    at = data.find(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()))
    data[at] ^= 1
    file.write_bytes(data)


def _torch_saved(run: Path) -> None:
    torch.save(torch.zeros(3, 4), run / "step_4/linear/outputs_cpu.pt")


def _alias(run: Path) -> None:
    # A copy, and then another tensor than the one whose alias it is.
    file = run / "step_4/relu/inputs_input_cpu.pt"
    file.unlink()
    torch.save(torch.ones(3, 4), file)


def _missing(run: Path) -> None:
    (run / "step_4/linear/outputs_cpu.pt").unlink()


def _symlink(run: Path) -> None:
    file = run / "step_4/linear/outputs_cpu.pt"
    os.rename(file, run.parent / "elsewhere.pt")
    file.symlink_to(run.parent / "elsewhere.pt")


def _document(run: Path) -> None:
    file = run / "step_4/step.json"
    file.write_text(file.read_text().replace('"calls":[', '"calls":["../x",'))


@pytest.mark.parametrize("change", [_payload, _torch_saved, _alias, _missing, _symlink, _document])
@pytest.mark.parametrize("other", ["pt", "safetensors"])
def test_damage_is_told_as_ever(
    tmp_path: Path, change: Change, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = capture(tmp_path / "a", "pt")
    change(source)
    said = []
    for number, way in enumerate((converted, lambda *call: one_by_one(monkeypatch, *call))):
        with pytest.raises((ReadError, VerifyError)) as caught:
            way(source, tmp_path / f"to{number}", other)
        said.append(str(caught.value))
        there = tmp_path / f"to{number}" / source.name
        assert tlcore.open_run(there).state == "incomplete"
        # Of a step that was begun nothing is left.
        assert not [*there.rglob("*.tmp")] and not (there / "step_4").exists()
    assert said[0] == said[1]


def test_a_step_that_cannot_be_written_while_the_next_is_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = capture(tmp_path / "a", {"name": "safetensors", "commit_s": 600}, steps=8)
    publish = UnfinishedFolder.publish

    def failing(self: UnfinishedFolder) -> None:
        if self._target.endswith("step_5"):
            raise BackendError("the disk is full")
        publish(self)

    monkeypatch.setattr(UnfinishedFolder, "publish", failing)
    with pytest.raises(BackendError, match="the disk is full"):
        converted(source, tmp_path / "b", "pt")
    there = tlcore.open_run(tmp_path / "b" / source.name)
    # At most the one that was written then comes after it.
    assert there.state == "incomplete" and set(range(5)) <= set(there.steps) <= {0, 1, 2, 3, 4, 6}
    assert not [*Path(there.url).rglob("*.tmp")] and there.verify() > 0


def test_damaged_segments_are_told_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = capture(tmp_path / "a", "safetensors")
    (data,) = source.glob("segments/*.safetensors")
    content = bytearray(data.read_bytes())
    content[-3] ^= 1
    data.write_bytes(content)
    said = []
    for number, way in enumerate((converted, lambda *call: one_by_one(monkeypatch, *call))):
        with pytest.raises(VerifyError) as caught:
            way(source, tmp_path / f"to{number}", "pt")
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_little_is_kept_of_steps_that_are_all_of_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    backend = {"name": "safetensors", "commit_s": 600}
    with tlcore.capture(model, output_dir=str(tmp_path), backend=backend, log_step_ids=[]) as captured:
        for step in range(40):
            model(torch.randn(1 + step // 2, 4))
    monkeypatch.setattr(segment_steps, "_MOST_KEPT", 50)

    def held() -> int:
        return sum(type(each) is segment_steps._Pair for each in gc.get_objects())

    # Other tests may have left some behind.
    gc.collect()
    before = most = held()
    alike = []
    for each in alike_steps(tlcore.open_run(captured.url).stored, 0):
        alike.append(each.step)
        most = max(most, held())
    assert alike == list(range(1, 40, 2)) and most <= before + 6


def test_what_is_nested_deeper_than_can_be_looked_at_makes_no_step_alike(tmp_path: Path) -> None:
    source = capture(tmp_path / "a", {"name": "safetensors", "commit_s": 600}, steps=8)
    (file,) = source.glob("segments/*_steps_*.json")
    index = json.loads(file.read_text())
    index["steps"]["values"] = [None, None, "deep", *[None] * 5]
    file.write_text(json.dumps(index).replace('"deep"', "[" * 700 + "]" * 700))
    run = tlcore.open_run(source)
    assert run.step(0).names

    def at_depth(depth: int) -> list[int]:
        return at_depth(depth - 1) if depth else [each.step for each in alike_steps(run.stored, 0)]

    # The step before it still is; of those behind it none, since where they lie was told no further.
    assert at_depth(0) == [1, 3, 4, 6, 7]
    assert at_depth(400) in ([1], [1, 3, 4, 6, 7])


def test_what_is_harmless_but_another_is_kept(tmp_path: Path, written: Counts) -> None:
    source = capture(tmp_path / "a", "pt")
    # An alias that is a file of its own, and a structure that no other step has.
    alias = source / "step_3/relu/inputs_input_cpu.pt"
    content = alias.read_bytes()
    alias.unlink()
    alias.write_bytes(content)
    (source / "step_4/part/post_fwd_inputs.json").write_text(
        (source / "step_4/part/outputs.json").read_text()
    )
    structures = {str(file): file.read_bytes() for file in (source / "step_4").rglob("*/*.json")}
    document = json.loads(without_checksum((source / "step_4/step.json").read_bytes()))
    document["structures_hash"] = digest_of_files(structures)
    (source / "step_4/step.json").write_bytes(with_checksum(compact(document) + "\n"))
    for other in ("pt", "safetensors"):
        written.update({True: 0, False: 0})
        there = converted(source, tmp_path / other, other)
        assert written == {True: 2, False: 0}
        assert files(converted(there, tmp_path / f"{other}-back", "pt")) == files(source)


def test_a_directory_that_is_there_is_filled_as_ever(tmp_path: Path, written: Counts) -> None:
    source = capture(tmp_path / "a", "pt")
    (tmp_path / "b" / source.name / "step_3").mkdir(parents=True)
    there = converted(source, tmp_path / "b", "pt")
    assert written == {True: 2, False: 1} and files(there) == files(source)
    # What must be on the disk before the call returns is put there file by file.
    assert not LocalStore(tmp_path / "c", fsync=True).begin_folder("step_0")
    assert not (tmp_path / "c" / "step_0").exists()


def test_what_a_crash_leaves_is_seen_by_nobody_and_removed(tmp_path: Path) -> None:
    source = capture(tmp_path / "a", "pt")
    begun = source / "step_5.0123abcd-7.tmp"
    (begun / "part").mkdir(parents=True)
    (begun / "part" / "inputs_0_cpu.pt").write_bytes(b"half")
    os.utime(begun, (0, 0))
    run = tlcore.open_run(source)
    assert run.steps == [0, 1, 2, 3, 4] and not run.incomplete_steps and run.verify()
    assert main(["prune", str(tmp_path / "a"), "--uploads", "--yes"]) == 0
    assert not begun.exists() and json.loads((source / "run.json").read_text())["state"] == "complete"
