"""Plain files of tensors: dictionaries and single ones, and what a pickle cannot do here."""

from __future__ import annotations

import gc
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tlcore.errors import ReadError
from tlcore_backends.foreign.pickled import load
from tlcore_backends.foreign.torch_files import TorchFile


class TestSafetensors(ForeignConformance):
    tool = "plain"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        save_file(dict(tensors), directory / "any.safetensors")
        return directory / "any.safetensors"


class TestTorch(ForeignConformance):
    tool = "plain"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        torch.save(dict(tensors), directory / "any.pt")
        return directory


class TestNumpy(ForeignConformance):
    tool = "plain"
    low = torch.float16

    def write(self, directory: Path, tensors: Tensors) -> Path:
        arrays: Any = {name: each.numpy() for name, each in tensors.items()}
        np.savez(directory / "any.npz", **arrays)
        return directory / "any.npz"


class TestOneTensorAFile(ForeignConformance):
    tool = "plain"

    def tensors(self) -> dict[str, torch.Tensor]:
        # Files have no order but that of their names.
        return dict(sorted(super().tensors().items()))

    def write(self, directory: Path, tensors: Tensors) -> Path:
        for name, tensor in tensors.items():
            torch.save(tensor, directory / f"{name}.pt")
        return directory


def test_names_tell_arguments_and_results_and_nesting(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    held = {
        "m.input": x,
        "m.outputs.1.key": x + 1,
        "n": {"input": [x + 2, {"mask": x + 3}], "output": x + 4},
        "input_ids": x + 5,
        "strided": x.t(),
        "parameter": torch.nn.Parameter(x),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(True),
    }
    torch.save(held, tmp_path / "x.pt")
    step = tlcore.open_run(tmp_path).step(0)
    assert {name.removeprefix("step_0/"): tensor.tolist() for name, tensor in step.items()} == {
        "m/inputs_cpu": x.tolist(),
        "m/outputs_1_key_cpu": (x + 1).tolist(),
        "n/inputs_0_cpu": (x + 2).tolist(),
        "n/inputs_1_mask_cpu": (x + 3).tolist(),
        "n/outputs_cpu": (x + 4).tolist(),
        "input_ids/outputs_cpu": (x + 5).tolist(),
        "strided/outputs_cpu": x.t().tolist(),
        "parameter/outputs_cpu": x.tolist(),
        "empty/outputs_cpu": [],
        "scalar/outputs_cpu": True,
    }
    call = step.call("n")
    assert call.inputs.args[1]["mask"].equal(x + 3)
    assert step.calls[:2] == ["m", "n"]


def test_names_give_an_order_in_which_what_is_within_a_module_comes_before_its_result(tmp_path: Path) -> None:
    order = [
        "embed",
        "m.layers.2.a",
        "m.layers.2.mlp.down",
        "m.layers.2.mlp",
        "m.layers.2",
        "m.layers.10.a",
        "m",
    ]
    save_file({name: torch.ones(1) for name in sorted(order)}, tmp_path / "x.safetensors")
    found = [record["module"] for record in tlcore.open_run(tmp_path).step(0).records]
    assert found == order


def test_numbered_files_are_steps_and_others_are_one(tmp_path: Path) -> None:
    for number in (2, 10):
        torch.save({"m": torch.full((2,), float(number))}, tmp_path / f"step_{number}.pt")
    run = tlcore.open_run(tmp_path)
    assert {number: run.step(number)[f"step_{number}/m/outputs_cpu"].tolist() for number in run.steps} == {
        2: [2.0, 2.0],
        10: [10.0, 10.0],
    }
    (tmp_path / "step_2.pt").rename(tmp_path / "first.pt")
    with pytest.raises(ReadError, match=r"first\.pt and step_10\.pt both have 'm': call them step_<number>"):
        tlcore.open_run(tmp_path).step(0).names  # noqa: B018


def test_arrays_of_any_order_are_read_and_objects_are_not(tmp_path: Path) -> None:
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    held: Any = {
        "fortran": np.asfortranarray(plain),
        "big": plain.astype(">f4"),
        "object": np.array([None, 1]),
    }
    np.savez_compressed(tmp_path / "z.npz", **held)
    np.savez(tmp_path / "s.npz", **held)
    np.save(tmp_path / "fortran.npy", held["fortran"])
    for name in ("z.npz", "s.npz"):
        run = tlcore.open_run(tmp_path / name)
        assert run.tensor("step_0/fortran/outputs").tolist() == plain.tolist()
        assert run.tensor("step_0/big/outputs").tolist() == plain.tolist()
        assert run.step(0).payload("step_0/big/outputs").read(2, 4).tolist() == [2.0, 3.0]
        assert run.ledger.skipped == 1
        assert "would have to be unpickled" in run.step(0).call("object").outputs.skipped
    assert (
        tlcore.open_run(tmp_path / "fortran.npy").tensor("step_0/fortran/outputs").tolist() == plain.tolist()
    )


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_runs_nothing_and_what_holds_a_tensor_is_counted(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    held = {"m": torch.ones(2), "evil": _Evil(marker), "sparse": torch.eye(3).to_sparse(), "n": 1}
    torch.save(held, tmp_path / "x.pt")
    run = tlcore.open_run(tmp_path / "x.pt")
    assert run.step(0).names == ["step_0/m/outputs_cpu"]
    assert run.ledger.to_json()["reasons"] == {"in a _rebuild_sparse_tensor, which is not opened": 1}
    assert not marker.exists()
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(_Evil(marker)))
    with pytest.raises(ReadError, match=r"y\.pkl: a pickle is not read|is a file"):
        tlcore.open_run(tmp_path / "y.pkl")
    assert not marker.exists()


class _Own(dict[str, Any]):
    """What models return is often a class of their own."""


def test_dictionaries_of_other_classes_are_opened_where_they_hold_all_and_arrays_are_counted(
    tmp_path: Path,
) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    ones, twos = torch.ones(2), torch.full((2,), 2.0)
    beside = _Own(m=ones)
    beside.more = twos  # type: ignore[attr-defined]
    held = {
        "own": _Own(m=ones),
        "beside": beside,
        "model": outputs.BaseModelOutput(last_hidden_state=ones, hidden_states=(ones, twos)),
        "array": np.ones(2),
        "arrays": [np.ones(2), np.float32(1)],
    }
    torch.save(held, tmp_path / "x.pt")
    run = tlcore.open_run(tmp_path / "x.pt")
    assert {name: run.tensor(name)[0].item() for name in run.step(0).names} == {
        "step_0/own/outputs_m_cpu": 1,
        "step_0/model/outputs_last_hidden_state_cpu": 1,
        "step_0/model/outputs_hidden_states_0_cpu": 1,
        "step_0/model/outputs_hidden_states_1_cpu": 2,
    }
    assert run.ledger.to_json()["reasons"] == {
        "in a _Own, which is not opened": 1,
        "in a numpy array, which is not opened": 2,
    }


def test_keys_of_any_kind_have_the_same_names_each_time_and_what_has_no_bytes_is_counted(
    tmp_path: Path,
) -> None:
    keys: list[Any] = ["a/b", 3, (1, 2), None, b"raw", 1.5, torch.float32, torch.device("cpu")]
    held = {key: torch.tensor([float(place)]) for place, key in enumerate(keys)}
    more = {torch.device("cuda:0"): torch.tensor([8.0]), "m": torch.empty(3, device="meta")}
    torch.save({**held, **more}, tmp_path / "any.pt")
    step = tlcore.open_run(tmp_path).step(0)
    assert step.names == tlcore.open_run(tmp_path).step(0).names
    assert not any("0x" in name for name in step.names)
    assert [float(step.tensor(name)) for name in step.names] == [float(place) for place in range(9)]
    assert step.ledger.reasons == {"in a _rebuild_meta_tensor_no_storage, which is not opened": 1}
    assert step.names[4] == "step_0/raw/outputs_cpu"


def test_keys_that_are_no_plain_ones_cost_little_however_many_and_large_they_are(tmp_path: Path) -> None:
    begin = time.process_time()
    named = b"\x80\x02}(ctorch\nfloat32\nq\x00K\x01" + b"h\x00K\x01" * 100_000 + b"u."
    found = load(named)
    assert len(found) == 100_001 and list(found)[:2] == [
        "Name(text='torch float32')",
        "Name(text='torch float32')~2",
    ]
    assert time.process_time() - begin < 100
    large: Any = 1
    for _ in range(18):
        large = (large, large)
    torch.save({large: torch.ones(1), (1, "a"): torch.ones(1)}, tmp_path / "any.pt")
    modules = [name.split("/")[1] for name in tlcore.open_run(tmp_path).step(0).names]
    assert modules == ["%3Ctuple%3E", "(1,%20%27a%27)"]


def test_no_dump_is_kept_for_good_but_the_last_file_that_was_looked_at(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        torch.save({"a": torch.ones(1)}, tmp_path / str(number) / "any.pt")
        assert len(tlcore.open_run(tmp_path / str(number)).step(0).names) == 1
    gc.collect()
    places = [each._files.url for each in gc.get_objects() if type(each) is TorchFile]
    assert len([place for place in places if place.startswith(str(tmp_path))]) <= 1


def test_containers_that_share_themselves_end(tmp_path: Path) -> None:
    shared: list[Any] = [torch.ones(1)]
    for _ in range(60):
        shared = [shared, shared]
    torch.save({"bomb": shared}, tmp_path / "bomb.pt")
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    torch.save(cycle, tmp_path / "cycle.pt")
    for name in ("bomb", "cycle"):
        with pytest.raises(ReadError, match="holds too much, or is nested too deep"):
            tlcore.open_run(tmp_path / f"{name}.pt").step(0).names  # noqa: B018


def test_a_near_miss_says_what_is_wrong(tmp_path: Path) -> None:
    torch.save({"m": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ReadError, match=r"old\.pt: not a \.pt file .*torch before 1\.6"):
        tlcore.open_run(tmp_path)
    (tmp_path / "old.pt").unlink()
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ReadError, match=r"x\.safetensors: not a safetensors file"):
        tlcore.open_run(tmp_path)


def test_checkpoints_of_another_ending_are_read_and_compressed_ones_are_refused(tmp_path: Path) -> None:
    torch.save({"hidden_state": torch.ones(2)}, tmp_path / "data_0.ckpt")
    for path in (tmp_path, tmp_path / "data_0.ckpt"):
        assert tlcore.open_run(path).tensor("step_0/hidden_state/outputs_cpu").tolist() == [1.0, 1.0]
    (tmp_path / "data_0.ckpt").rename(tmp_path / "data_0.ckpt.gz")
    for path in (tmp_path, tmp_path / "data_0.ckpt.gz"):
        with pytest.raises(ReadError, match=r"data_0\.ckpt\.gz: is compressed; unpack it"):
            tlcore.open_run(path)


def test_a_file_at_a_url_is_opened_too(tmp_path: Path) -> None:
    import fsspec

    save_file({"m": torch.ones(2)}, tmp_path / "x.safetensors")
    with fsspec.open("memory://foreign-plain/x.safetensors", "wb") as target:
        target.write((tmp_path / "x.safetensors").read_bytes())
    for url in ("memory://foreign-plain/x.safetensors", "memory://foreign-plain"):
        assert tlcore.open_run(url).tensor("step_0/m/outputs_cpu").tolist() == [1.0, 1.0]


def test_what_nearly_is_another_tools_dump_says_so_when_it_is_read_as_plain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(torch.ones(2), tmp_path / "captured_tensors_cte_module_x_output.pt")
    with caplog.at_level("WARNING", "tlcore"):
        run = tlcore.open_run(tmp_path)
    assert run.document["backend"] == "plain"
    assert "read as plain tensors, but nearly is another: captured_tensors_cte_module_x" in caplog.text


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no float8_e8m0fnu")
def test_dtypes_of_safetensors_that_torch_calls_otherwise_are_read_and_others_counted(tmp_path: Path) -> None:
    scales = torch.arange(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file({"scales": scales, "x": torch.ones(2)}, tmp_path / "a.safetensors")
    assert tlcore.open_run(tmp_path).tensor("step_0/scales/outputs").view(torch.uint8).tolist() == [
        0,
        1,
        2,
        3,
    ]
    data = (tmp_path / "a.safetensors").read_bytes().replace(b"F8_E8M0", b"F6_E2M3")
    (tmp_path / "a.safetensors").write_bytes(data)
    run = tlcore.open_run(tmp_path)
    assert run.ledger.reasons == {"there is no dtype F6_E2M3 here": 1}
    assert run.verify() == 1


def test_nothing_is_said_of_the_versions_that_a_dump_does_not_tell(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"m": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    found = tlcore.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert any("does not tell its versions and settings" in note for note in found.notes)
    assert not any("of the same versions" in note for note in found.notes)
