"""Places that hold no dump, half of one, or two: what is said of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign import (
    test_hidden_states,
    test_msprobe,
    test_nxd,
    test_sglang,
    test_transformer_engine,
)
from tests.backends.foreign.conformance import ForeignConformance
from tests.backends.foreign.test_sglang import _dumped
from tlcore.errors import ReadError

HELD = {"model.layers.0.mlp": torch.arange(6.0), "model.norm": torch.ones(3)}


def test_an_empty_directory_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"nor is it a dump of another tool that is known\n  it is empty"):
        tlcore.open_run(tmp_path)


def test_a_link_to_a_file_is_that_file_and_one_in_a_directory_is_named(tmp_path: Path) -> None:
    # Hugging Face's cache has blobs without an ending, and links with names.
    save_file(HELD, tmp_path / "blob")
    directory = tmp_path / "snapshot"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to("../blob")
    run = tlcore.open_run(directory / "model.safetensors")
    assert run.tensor("step_0/model.norm/outputs").equal(HELD["model.norm"]) and run.verify() == 2
    assert run.step(0).payload("step_0/model.norm/outputs").read(1, 3).equal(torch.ones(2))
    with pytest.raises(ReadError, match=r"has symbolic links \(model\.safetensors\), which are not followed"):
        tlcore.open_run(directory)


def test_links_that_lead_nowhere_or_round_are_said_to(tmp_path: Path) -> None:
    (tmp_path / "round.pt").symlink_to(tmp_path / "round.pt")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nothing.pt")
    for name in ("round.pt", "gone.pt"):
        with pytest.raises(ReadError, match=rf"{name}: is a symbolic link that leads nowhere"):
            tlcore.open_run(tmp_path / name)
    save_file(HELD, tmp_path / "x.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert tlcore.open_run(tmp_path).verify() == 2


def test_two_tools_in_one_directory_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _dumped(tmp_path, "non_intrusive__model.norm.output", torch.ones(2), 1)
    with caplog.at_level(logging.WARNING, "tlcore"):
        tlcore.open_run(tmp_path)
    assert not caplog.records
    torch.save(torch.ones(2), tmp_path / "captured_tensors_cte_step_1_module_layers.0_output.pt")
    with caplog.at_level(logging.WARNING, "tlcore"):
        run = tlcore.open_run(tmp_path)
    assert run.document["backend"] == "sglang-dumper"
    assert "is also one of nxd-capture, which is not read: keep them apart" in caplog.text


@pytest.mark.parametrize(
    ("suite", "beside"),
    [
        (test_sglang.TestDumper, "forward_pass_id=0___name=old.pt"),
        (test_sglang.TestFolder, "Pass.pt"),
        (test_nxd.TestNeuronCapture, "captured_tensors_cte_module_layers.0_output.pt"),
        (test_hidden_states.TestHiddenStates, "data_0.ckpt"),
        (test_transformer_engine.TestTransformerEngine, "tensor_dumps/rank_0/late_output.pt"),
    ],
)
def test_files_that_are_not_read_are_told(
    suite: type[ForeignConformance], beside: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = suite().write(tmp_path, suite().tensors())
    with caplog.at_level(logging.WARNING, "tlcore"):
        tlcore.open_run(directory)
        assert not caplog.records
        place = next(iter((*directory.glob("TP*"), *directory.glob("dump_*"))), (directory / beside).parent)
        torch.save(torch.ones(2), place / Path(beside).name)
        run = tlcore.open_run(directory)
    assert run.document["backend"] == suite.tool
    assert f"1 files are not read as a part of the dump of {suite.tool}, such as " in caplog.text
    assert Path(beside).name in caplog.text


def test_what_msprobe_was_asked_to_save_by_hand_is_read(tmp_path: Path) -> None:
    test_msprobe.TestMsprobe().write(tmp_path, {"model.layers.0.mlp": torch.ones(2, 3)})
    data = next(tmp_path.rglob("dump_tensor_data"))
    torch.save(torch.full((2,), 5.0), data / "my_mask.0.debug.pt")
    (data / "notes.txt").write_text("no tensor")
    run = tlcore.open_run(tmp_path)
    assert run.tensor("step_0/my_mask.0.debug/outputs_cpu").tolist() == [5, 5]
    assert run.verify() == run.ledger.stored == 2


def _cut(file: Path, count: int) -> Path:
    file.write_bytes(file.read_bytes()[:-count])
    return file


def test_what_ends_too_early_names_its_file(tmp_path: Path) -> None:
    def saved(name: str, save: Any) -> Path:
        save(tmp_path / name)
        return tmp_path / name

    arrays: dict[str, Any] = {name: each.numpy() for name, each in HELD.items()}
    cut = [
        _cut(saved("a.safetensors", lambda file: save_file(HELD, file)), 5),
        _cut(saved("a.pt", lambda file: torch.save(HELD, file)), 1),
        _cut(saved("a.npz", lambda file: np.savez(file, **arrays)), 30),
        _cut(saved("a.npy", lambda file: np.save(file, arrays["model.norm"])), 3),
    ]
    for file in cut:
        with pytest.raises(tlcore.TlcoreError, match=rf"(?m)^ *{file}: "):
            tlcore.open_run(file).verify()


def test_names_of_any_script_are_read_and_cannot_leave_the_run(tmp_path: Path) -> None:
    names = ["m\u00f6del.\u6ce8\u610f", "a\nb", "../../etc", "", "\u202eabc", "x" * 500]
    save_file(
        {name: torch.full((2,), float(at)) for at, name in enumerate(names)}, tmp_path / "x.safetensors"
    )
    run = tlcore.open_run(tmp_path / "x.safetensors")
    step = run.step(0)
    assert sorted(str(each["module"]) for each in step.records) == sorted(names)
    for record in step.records:
        assert record["name"].count("/") == 2 and record["name"].isprintable()
        assert step.tensor(record["name"]).tolist() == [float(names.index(record["module"]))] * 2
