"""vLLM's own extraction of hidden states, and the files that speculators makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tests.backends.foreign.tools import installed, write
from tlcore.errors import ReadError

TOKENS = torch.tensor([5, 3, 9, 1, 7])
CONNECTORS = "hs-connectors==0.9.0"
# What its connector writes, and what its own reader makes of it.
EIGHT_BITS = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from hs_connectors import FP8Transfer
from hs_connectors.fp8_utils import SCALES_KEY, quantize_tensor_to_fp8
states = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(7))
states[2] *= 1e4
held, scales = quantize_tensor_to_fp8(states)
tokens = torch.tensor([5, 3, 9, 1, 7])
save_file({"hidden_states": held, SCALES_KEY: scales, "token_ids": tokens}, sys.argv[1] + "/hs_4.safetensors")
save_file(FP8Transfer(Path(sys.argv[1])).get_cached(4), sys.argv[2] + "/hs_4.safetensors")
"""


class TestHiddenStates(ForeignConformance):
    tool = "hidden-states"
    fault = "hidden_states.1"

    def tensors(self) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(7)
        return {f"hidden_states.{layer}": torch.randn(5, 6, generator=made).bfloat16() for layer in range(3)}

    def write(self, directory: Path, tensors: Tensors) -> Path:
        states = torch.stack(list(tensors.values()), 1)
        tokens = TOKENS if len(states) == len(TOKENS) else torch.arange(len(states))
        save_file({"hidden_states": states, "token_ids": tokens}, directory / "cmpl-1.safetensors")
        (directory / "cmpl-1.safetensors.lock").touch()
        return directory


def test_a_request_is_found_by_its_tokens_wherever_it_was_captured(tmp_path: Path) -> None:
    states = torch.randn(5, 2, 6)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    other = {"hidden_states": torch.randn(3, 2, 6), "token_ids": torch.tensor([8, 8, 2])}
    save_file({"hidden_states": states, "token_ids": TOKENS}, tmp_path / "a" / "x.safetensors")
    save_file(other, tmp_path / "a" / "y.safetensors")
    # The same requests under other names, and one with a token more.
    save_file(other, tmp_path / "b" / "a.safetensors")
    changed = states.clone()
    changed[3, 1] += 1
    save_file({"hidden_states": changed, "token_ids": TOKENS}, tmp_path / "b" / "b.safetensors")
    found = tlcore.compare(tmp_path / "a", tmp_path / "b")
    wrong = [(each.module, each.request) for each in found.results if each.status == "different"]
    assert wrong == [("hidden_states.1", "x")]
    assert {each.status for each in found.results} == {"different", "bitwise"}
    request = tlcore.open_run(tmp_path / "a").request("y")
    assert request["hidden_states.0/outputs_cpu"].equal(other["hidden_states"][:, 0])


def test_files_of_speculators_are_numbered_by_their_sample(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "hidden_states"
    folder.mkdir(parents=True)
    for number in (2, 10):
        held = {"hidden_states": torch.full((3, 2, 4), float(number)), "token_ids": torch.arange(3)}
        save_file(held, folder / f"hs_{number}.safetensors")
    for path in (folder, folder.parent):
        run = tlcore.open_run(path)
        assert run.steps == [2, 10]
        assert run.tensor("step_10/hidden_states.1/outputs_cpu").tolist() == [[10.0] * 4] * 3


def test_a_near_miss_says_what_is_missing(tmp_path: Path) -> None:
    save_file({"hidden_states": torch.ones(2, 1, 3)}, tmp_path / "x.safetensors")
    run = tlcore.open_run(tmp_path)
    assert run.document["backend"] == "plain"
    save_file(
        {"hidden_states": torch.ones(2, 1, 3), "token_ids": torch.arange(3)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ReadError, match=r"hidden states and tokens do not fit: \[2, 1, 3\] and \[3\]"):
        tlcore.open_run(tmp_path).step(0).names  # noqa: B018


@pytest.mark.slow
def test_states_in_eight_bits_are_restored_as_speculators_does(tmp_path: Path) -> None:
    for name in ("eight", "restored"):
        (tmp_path / name).mkdir()
    write(
        installed("hs-connectors", CONNECTORS),
        EIGHT_BITS,
        *(str(tmp_path / each) for each in ("eight", "restored")),
    )
    run, expected = tlcore.open_run(tmp_path / "eight"), tlcore.open_run(tmp_path / "restored")
    assert (run.document["backend"], run.steps) == ("hidden-states", [4]) and run.verify() == 4
    name = "step_4/hidden_states.1/outputs_cpu"
    assert run.tensor(name).dtype == torch.bfloat16 and run.tensor(name).equal(expected.tensor(name))
    stream = run.step(4).payload(name)
    assert stream.read(7, 13).equal(expected.tensor(name).flatten()[7:13])
    stream.close()
    assert tlcore.compare(run, expected, deep=True).equal


@pytest.mark.parametrize("shape", [(3, 1, 1), (4, 1, 2), (4,)])
def test_scales_that_are_not_one_for_each_token_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    states = torch.ones(4, 2, 3).to(torch.float8_e4m3fn)
    held = {
        "hidden_states": states,
        "hidden_states_scales": torch.full(shape, 2.0),
        "token_ids": torch.arange(4),
    }
    save_file(held, tmp_path / "x.safetensors")
    run = tlcore.open_run(tmp_path)
    if shape == (4,):
        assert run.tensor("step_0/hidden_states.1/outputs_cpu").tolist() == [[2.0] * 3] * 4
        return
    with pytest.raises(ReadError, match="its scales are not one for each token"):
        run.step(0).names  # noqa: B018
