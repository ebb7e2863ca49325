"""What can be known of a module that is no longer what it was when its call was captured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlcore
from tests.analysis.replay.layers import Counts, made
from tests.analysis.replay.test_replay import X, captured
from tests.engine.samples import llama


def told(url: str, call: str, module: nn.Module, **keys: Any) -> str:
    found = tlcore.replay(url, call, module, **keys)
    assert not found.equal
    return str(found)


def test_weights_that_were_updated_are_named_and_others_are_the_same(
    tmp_path: Path,
) -> None:
    model = made()
    url = captured(tmp_path, model)
    wrong = told(url, "step_0/first", lambda x: model.first(x) + 1)  # type: ignore[arg-type, operator]
    assert "parameters" not in wrong and "in no run" not in wrong
    model.first.register_forward_hook(lambda module, args, result: result + 1)  # type: ignore[union-attr]
    assert "its parameters and buffers are those of then, as far as 64 values" in told(
        url, "step_0/first", model.get_submodule("first")
    )
    optimiser = torch.optim.SGD(model.get_submodule("second").parameters(), 0.5)
    model(X).sum().backward()
    optimiser.step()
    assert "its parameters second.mix.weight, second.mix.bias are others than when the capture began" in told(
        url, "step_0/_root", model
    )
    second = told(url, "step_0/second", model.get_submodule("second"))
    assert "its parameters mix.weight, mix.bias are others" in second and "those of then" not in second
    document = Path(url, "run.json")
    run = json.loads(document.read_text())
    del run["environment"]["weights"], run["environment"]["training"]
    del run["checksum"]
    document.write_text(json.dumps(run))
    assert "whether its weights are those of then is in no run" in told(
        url, "step_0/second", model.get_submodule("second")
    )


def test_buffers_that_moved_on_and_the_state_that_a_call_changes_are_named(tmp_path: Path) -> None:
    norm = nn.Sequential(nn.BatchNorm1d(5)).train()
    url = captured(tmp_path, norm)
    found = told(url, "step_0/0", norm[0].eval())
    assert "its buffers running_mean, running_var, num_batches_tracked are others than when" in found
    assert "it is in evaluation mode now, in training mode when the capture began" in found

    counts = nn.Sequential(Counts())
    url = captured(tmp_path, counts)
    counts(X)
    found = told(url, "step_0/0", counts[0])
    assert "its buffers count, mean are others" in found
    assert "it changes its own state (seen, cache, count), and what that was before this call" in found


class _Cache:
    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []


class _Remembers(nn.Module):
    """Attends to all that it was ever given, which an object holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = _Cache()

    def forward(self, x: torch.Tensor, more: Any = None) -> torch.Tensor:
        cache = self.cache if more is None else more
        cache.layers.append(x.clone())
        return torch.stack(list(cache.layers)).sum(0)


def test_a_cache_in_an_object_is_left_as_it_was_and_named(tmp_path: Path) -> None:
    remembers = _Remembers()
    url = captured(tmp_path, nn.Sequential(remembers))
    found = told(url, "step_0/0", remembers)
    assert "it changes its own state (cache), and what that was before this call is in no run" in found
    assert len(remembers.cache.layers) == 1
    remembers.cache = _Cache()
    assert tlcore.replay(url, "step_0/0", remembers).bitwise
    given = _Cache()
    for _ in range(2):
        assert tlcore.replay(url, "step_0/0", remembers, replace={"more": given}).bitwise
    assert not given.layers


def test_dropout_is_told_by_the_mode_and_by_the_numbers_that_it_draws(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).eval()
    url = captured(tmp_path, model)
    model[1].train()
    found = told(url, "step_0/_root", model)
    assert "in it 1 are in training mode now, in evaluation mode when the capture began" in found
    assert "it draws random numbers" in found and "not deterministic" not in found
    model.train()
    assert "it is in training mode now, in evaluation mode" in told(url, "step_0/_root", model)
    modes = json.loads(Path(captured(tmp_path, model.eval().requires_grad_(False)), "run.json").read_text())
    assert modes["environment"]["training"] == {"": False}


def test_what_differs_from_itself_is_not_deterministic(tmp_path: Path) -> None:
    calls = []

    class Drifts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            return x + len(calls)

    model = nn.Sequential(Drifts())
    url = captured(tmp_path, model)
    assert "two replays of it differ from one another: it is not deterministic" in told(
        url, "step_0/0", model[0]
    )
    assert "not deterministic" not in told(url, "step_0/0", nn.Identity())


def test_an_argument_that_is_written_into_is_named(tmp_path: Path) -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, *, into: dict[str, torch.Tensor]) -> torch.Tensor:
            into["sum"][0] += 1
            return x * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adds = Adds()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            # The same memory: replayed, each has its own.
            result: torch.Tensor = self.adds(x, into={"sum": x[:, :2]})
            return result

    url = captured(tmp_path, Model())
    assert "it writes into its argument into.sum, and what else had the same memory is in no run" in told(
        url, "step_0/adds", Adds()
    )
    assert "in no run" not in told(url, "step_0/adds", lambda x, into: x)  # type: ignore[arg-type]


def test_modules_that_share_an_object_share_its_copy_and_models_in_attributes_are_not_copied(
    tmp_path: Path,
) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([_Remembers(), _Remembers()])
            self.held = [nn.Linear(2, 2)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.held[0] is held and self.parts[0].cache is self.parts[1].cache
            for each in self.parts:
                x = each(x)
            return x

    model = Shares()
    held = model.held[0]
    first, second = model.parts
    first.cache = second.cache = _Cache()  # type: ignore[assignment]
    url = captured(tmp_path, model)
    first.cache = second.cache = _Cache()  # type: ignore[assignment]
    assert tlcore.replay(url, "step_0/_root", model).bitwise
    assert not first.cache.layers  # type: ignore[union-attr]


def test_a_cache_of_transformers_moves_on_in_a_copy(tmp_path: Path) -> None:
    model = llama().eval()
    with torch.no_grad():
        before = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    with tlcore.capture(model, output_dir=str(tmp_path)) as capture, torch.no_grad():
        model(torch.tensor([[6, 7]]), past_key_values=before)
    url = str(capture.url)
    assert before.get_seq_length() == 5
    before.crop(3)
    for _ in range(2):
        assert tlcore.replay(url, "step_0/_root", model, replace={"past_key_values": before}).bitwise
    assert before.get_seq_length() == 3
