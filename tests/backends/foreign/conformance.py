"""What the source of every foreign dump must do: subclass it with a writer of the tool's files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tlcore
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.errors import TlcoreError
from tlcore.protocols import Source
from tlcore.reader import is_run
from tlcore.runs.convert import convert

Tensors = Mapping[str, torch.Tensor]


class ForeignConformance:
    """``tensors`` are the outputs of modules that `write` is given, all in one step."""

    tool: ClassVar[str]
    # A format may not have every dtype.
    low: ClassVar[torch.dtype] = torch.bfloat16

    fault: ClassVar[str] = "model.layers.1.mlp"

    def tensors(self) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(7)
        return {
            "model.embed": torch.randn(5, 6, generator=made),
            "model.layers.0.mlp": torch.randn(5, 6, generator=made).to(self.low),
            "model.layers.1.mlp": torch.randn(5, 6, generator=made),
            "model.norm": torch.randn(5, 6, generator=made),
        }

    def write(self, directory: Path, tensors: Tensors) -> Path:
        """Write the dump below ``directory``, which is empty; returns what is opened."""
        raise NotImplementedError

    def made(self, path: Path, fault: bool = False) -> tlcore.Run:
        path.mkdir()
        tensors = self.tensors()
        if fault:
            tensors[self.fault] = tensors[self.fault].clone()
            tensors[self.fault][2, 3] += 1
        return tlcore.open_run(self.write(path, tensors))

    def test_it_is_recognised_and_every_tensor_is_there_bit_for_bit(self, tmp_path: Path) -> None:
        run = self.made(tmp_path / "dump")
        assert (run.document["backend"], run.state, run.steps[0]) == (self.tool, "complete", 0)
        assert is_run(run.url)
        assert isinstance(run.stored.source, Source)
        step = run.step(0)
        for module, tensor in self.tensors().items():
            found = step.tensor(f"step_0/{module}/outputs")
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
            stream = step.payload(f"step_0/{module}/outputs")
            assert stream.read(7, 13).equal(tensor.flatten()[7:13])
            stream.close()
            assert step.call(module).outputs.equal(tensor)
        assert run.ledger.balanced
        assert run.verify() == sum(len(each) for each in run.values()) == run.ledger.stored
        modules = [record["module"] for record in step.records if record["module"] in self.tensors()]
        assert list(dict.fromkeys(modules)) == list(self.tensors())

    def test_a_planted_fault_is_found_against_the_same_tool_and_another(self, tmp_path: Path) -> None:
        good, bad = self.made(tmp_path / "good"), self.made(tmp_path / "bad", fault=True)
        assert tlcore.compare(good, good.url, deep=True).equal
        plain = tmp_path / "plain.safetensors"
        save_file(self.tensors(), plain)
        for other in (good.url, plain):
            found = tlcore.compare(other, bad.url, steps=[0], ignore_missing=True)
            first = found.first_difference
            assert first is not None and first.result.module == self.fault
        assert tlcore.compare(plain, good.url, steps=[0], ignore_missing=True).equal

    def test_it_converts_into_every_backend_and_stays_the_same(self, tmp_path: Path) -> None:
        run = self.made(tmp_path / "dump")
        for backend in ("pt", "safetensors"):
            url = convert(run, load_config(output_dir=str(tmp_path / backend), backend=backend))
            converted = tlcore.open_run(url)
            assert (converted.state, converted.document["converted_from"]) == ("complete", self.tool)
            assert converted.verify() == run.ledger.stored == converted.ledger.stored
            assert tlcore.compare(run, url).equal

    def test_the_commands_take_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        url = self.made(tmp_path / "dump").url
        assert main(["ls", url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["steps"][0]["tensors"] >= len(self.tensors())
        for words in (["ls", url, "--step", "0"], ["show", url, f"step_0/{self.fault}"], ["stats", url]):
            assert main(words) == 0
            assert self.fault in capsys.readouterr().out
        assert main(["verify", url]) == 0
        assert "the tool stored no hashes" in capsys.readouterr().out

    def test_damage_is_an_error_of_ours(self, tmp_path: Path) -> None:
        url = Path(self.made(tmp_path / "dump").url)
        files = [url] if url.is_file() else sorted(each for each in url.rglob("*") if each.is_file())
        for file in files:
            whole = file.read_bytes()
            for half in (whole[: len(whole) // 2], b"", whole[:9] + bytes(40) + whole[49:]):
                file.write_bytes(half)
                # What is left may be sound without it; nothing else than our own errors comes out.
                with contextlib.suppress(TlcoreError):
                    run = tlcore.open_run(url)
                    assert run.verify() == run.ledger.stored
            file.write_bytes(whole)
        assert tlcore.open_run(url).verify()


class Emit(nn.Module):
    """Returns a given tensor, whatever it is called with."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tensor.clone()


class Emitting(nn.Module):
    """A model whose modules return what they are told, one after the other."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.names = list(tensors)
        for name, tensor in tensors.items():
            parent: nn.Module = self
            *outer, last = name.split(".")
            for part in outer:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, Emit(tensor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x
