"""vLLM's own extraction of hidden states, and the files that speculators makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tlcore.errors import ReadError

TOKENS = torch.tensor([5, 3, 9, 1, 7])


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
