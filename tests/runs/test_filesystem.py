"""The fsspec filesystem ``tlcore``: any run as the tree that the ``pt`` backend writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch

import tlcore
from tests.runs.test_convert import capture, converted, files, two_ranks
from tlcore.errors import ConfigError, ReadError
from tlcore.runs.filesystem import RunFileSystem
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.sink import SafetensorsSink


def shown(run: str | Path) -> dict[str, bytes]:
    """Every file that the filesystem shows, whole; its stated size must be true."""
    filesystem = RunFileSystem(str(run))
    found = filesystem.find("", detail=True)
    contents = {name: filesystem.cat_file(name) for name in found}
    assert {name: info["size"] for name, info in found.items()} == {n: len(d) for n, d in contents.items()}
    return contents


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_run_looks_as_pt_writes_it(
    tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = capture(tmp_path / "a", backend)
    assert shown(source) == files(converted(source, tmp_path / "b", "pt", capsys))


def test_two_ranks_and_every_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = two_ranks(tmp_path / "a" / "run-1", SafetensorsSink)
    assert shown(source) == files(converted(source, tmp_path / "b", "pt", capsys))
    plain = two_ranks(tmp_path / "c" / "run-1", PtSink)
    assert shown(plain) == files(plain)


def test_a_damaged_document_of_the_run_gets_no_checksum_that_fits(tmp_path: Path) -> None:
    source = two_ranks(tmp_path / "run-1", SafetensorsSink)
    file = source / "run.json"
    file.write_text(file.read_text().replace('"skipped": 0', '"skipped": 7'))
    filesystem = RunFileSystem(str(source))
    with pytest.raises(ReadError, match=r"run\.json: damaged, it was changed"):
        filesystem.cat_file("run.json")
    assert filesystem.cat_file("step_0/module_calls.txt")


def test_whose_files_it_shows_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match=r"shows the files of one run\. Give its path or URL as run="):
        fsspec.open("tlcore://step_0/step.json")


def test_torch_loads_through_it(tmp_path: Path) -> None:
    source = capture(tmp_path, "safetensors")
    filesystem = fsspec.filesystem("tlcore", run=str(source))
    assert isinstance(filesystem, RunFileSystem)
    stems = ["inputs", "inputs_0_cpu", "outputs", "outputs_cpu", "post_fwd_inputs", "post_fwd_inputs_0_cpu"]
    names = [f"step_0/linear/{stem}{'.pt' if 'cpu' in stem else '.json'}" for stem in stems]
    assert sorted(filesystem.ls("step_0/linear", detail=False)) == sorted(names)
    with filesystem.open("tlcore://step_0/linear/outputs_cpu.pt") as file:
        loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded, tlcore.open_run(source).tensor("step_0/linear/outputs_cpu"))
    assert filesystem.cat("step_0/module_calls.txt") == b"_root\nlinear\nrelu\nrelu_1\n"
    assert filesystem.isdir("step_0") and not filesystem.exists("step_9")
    for path in ("missing", "step_0/missing.pt"):
        with pytest.raises(FileNotFoundError):
            filesystem.open(path)
        with pytest.raises(FileNotFoundError):
            filesystem.ls(path)
    own = tmp_path / "own"
    own.write_text("x")
    changes: tuple[Callable[[], object], ...] = (
        lambda: filesystem.open("new", "wb"),
        lambda: filesystem.mkdir("new"),
        lambda: filesystem.makedirs("new/er"),
        lambda: filesystem.rm("run.json"),
        lambda: filesystem.rm("step_0", recursive=True),
        lambda: filesystem.copy("run.json", "new"),
        lambda: filesystem.mv("run.json", "new"),
        lambda: filesystem.touch("new"),
        lambda: filesystem.pipe("new", b"x"),
        lambda: filesystem.put(str(own), "new"),
    )
    for change in changes:
        with pytest.raises(NotImplementedError, match="a run can only be read here"):
            change()


def test_a_step_is_looked_at_when_something_in_it_is_asked_for(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[], backend="safetensors") as captured:
        for _ in range(50):
            model(torch.ones(1, 2))
    filesystem = RunFileSystem(captured.url)
    names = ["run.json", *(f"step_{number}" for number in range(50))]
    assert filesystem.ls("", detail=False) == names
    assert [each["type"] for each in filesystem.ls("")] == ["file", *["directory"] * 50]
    assert filesystem.exists("step_49") and not filesystem.exists("step_50")
    content = filesystem.cat_file("step_7/_root/outputs_cpu.pt")
    # As many as are kept, and one that is made again.
    assert len(filesystem.find("")) == 1 + 50 * len(filesystem.find("step_7"))
    assert filesystem.cat_file("step_7/_root/outputs_cpu.pt") == content
    for index in Path(captured.url).glob("segments/*.json"):
        if "catalogue" not in index.name:
            index.unlink()
    lost = RunFileSystem(captured.url)
    assert lost.ls("", detail=False) == names
    with pytest.raises(tlcore.ReadError, match="no file"):
        lost.ls("step_3")
