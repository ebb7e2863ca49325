"""A fault of a module's own code, between its submodules: which module is named, and when none is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main
from tlcore.analysis import Divergence
from tlcore.analysis.origin import Birth, Seen, birth
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

X = torch.linspace(-1, 1, 12).reshape(3, 4)
Capture = Callable[..., str]


class Attention(nn.Module):
    """Multiplies by ``scale`` between its submodules, at each call by the next of them."""

    def __init__(self, scales: Sequence[float]) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scales = list(scales)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        mixed = self.q(x) * self.scales[0] + self.k(x)
        self.scales = self.scales[1:] + self.scales[:1]
        return self.o(mixed if mask is None else mixed + mask.sum())


class Layer(nn.Module):
    def __init__(self, scales: Sequence[float], mask: torch.Tensor | None = None) -> None:
        super().__init__()
        self.norm, self.attn, self.mask = nn.LayerNorm(4), Attention(scales), mask

    def forward(self, x: torch.Tensor) -> Any:
        for _ in self.attn.scales:
            x = x + self.attn(self.norm(x), self.mask)
        return x


class Model(nn.Module):
    def __init__(self, *layers: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.layers, self.factor = nn.ModuleList(layers), factor

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x) * self.factor
        return x


def model(*scales: float, factor: float = 1.0, mask: torch.Tensor | None = None) -> Model:
    """Two layers, the second of which has these scales, with the same weights each time."""
    torch.manual_seed(0)
    return Model(Layer([1.0] * len(scales)), Layer(scales, mask), factor=factor)


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    def run(module: nn.Module, **keys: Any) -> str:
        with tlcore.capture(module, output_dir=str(tmp_path / "out"), **keys) as captured:
            module(X)
        return captured.url

    return run


def first(a: str, b: str, **keys: Any) -> Divergence:
    found = tlcore.compare(a, b, **keys).first_divergence
    assert found is not None
    return found


def place(found: Divergence) -> tuple[str, bool | None, str | None]:
    return found.module, found.born, found.within


def test_a_modules_own_code_is_named(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = capture(model(1.0)), capture(model(2.0))
    said = (
        "layers.1.attn.o, inputs of step 0; born in layers.1.attn, between its captured submodules:"
        " its inputs and all outputs in it before agree"
    )
    result = tlcore.compare(a, b)
    assert str(result.first_divergence) == said
    assert said in result._repr_html_()
    for output in ("table", "markdown", "html"):
        assert main(["compare", a, b, "--format", output]) == 1
        assert said in capsys.readouterr().out.replace("\\_", "_")
    assert main(["compare", a, b, "--format", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    for key in ("first_divergence", "first_difference"):
        assert document[key] == {
            **{"step": 0, "module": "layers.1.attn.o", "call": 0, "direction": "inputs"},
            **{"born": True, "within": "layers.1.attn", "within_call": 0},
        }


def test_the_call_of_the_module_is_named(capture: Capture) -> None:
    found = first(capture(model(1.0, 1.0)), capture(model(1.0, 2.0)))
    assert (found.module, found.call, found.within, found.within_call) == (
        *("layers.1.attn.o", 1),
        *("layers.1.attn", 1),
    )
    assert "born in layers.1.attn (call 1), between" in str(found)


def test_nan_of_a_modules_own_code(capture: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    run = capture(model(torch.nan))
    for url in (run, capture(model(torch.nan), capture="stats")):
        found = tlcore.stats(url).first_nan
        assert found is not None and (found.born, found.within) == (True, "layers.1.attn")
        assert "; born in layers.1.attn, between its captured submodules: its inputs" in str(found)
    assert main(["stats", run, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["first_nan"]
    assert (document["born"], document["within"], document["within_call"]) == (True, "layers.1.attn", 0)
    whole = tlcore.stats(capture(model(1.0, factor=torch.nan))).first_nan
    assert whole is not None and (whole.tensor.module, whole.born, whole.within) == ("layers.1", True, "")


def test_the_models_own_code_or_what_it_was_given(capture: Capture) -> None:
    found = first(capture(model(1.0)), capture(model(1.0, factor=2.0)))
    assert place(found) == ("layers.1", True, "")
    assert "born in _root, between its captured submodules: its inputs" in str(found)
    parts = {"module_call_match": "."}
    found = first(capture(model(1.0), **parts), capture(model(1.0, factor=2.0), **parts))
    assert place(found) == ("layers.1", None, "")
    assert "born between the model's captured modules, or given to it from outside" in str(found)


@pytest.mark.parametrize("skip", ["missing in A", "missing in B", "ignored", "unreadable", "not compared"])
def test_nothing_is_claimed_where_an_output_before_is_not_known(capture: Capture, skip: str) -> None:
    some = {"module_call_match": r"^(?!.*attn\.k$)"}
    a = capture(model(1.0), **(some if skip in ("missing in A", "ignored") else {}))
    b = capture(model(2.0), **(some if skip == "missing in B" else {}))
    keys: dict[str, Any] = {"ignore_missing": skip == "ignored"}
    if skip == "unreadable":
        next(Path(b).glob("step_0/layers.1.attn.k/outputs*.pt")).unlink()
    if skip == "not compared":
        keys["modules"] = r"attn$|attn\.[qo]$"
    found = first(a, b, **keys)
    assert place(found) == ("layers.1.attn.o", None, None)
    assert "where it comes from is not known" in str(found)


def test_inputs_that_are_not_known_leave_the_calls_around(capture: Capture) -> None:
    mask = torch.ones(5, 5)
    a, b = capture(model(1.0, mask=mask)), capture(model(2.0, mask=mask))
    assert place(first(a, b)) == ("layers.1.attn.o", True, "layers.1.attn")
    a, b = (capture(model(scale, mask=mask), max_tensor_size=20) for scale in (1.0, 2.0))
    assert place(first(a, b)) == ("layers.1.attn.o", True, "layers.1")
    spoiled = capture(model(torch.nan, mask=mask), max_tensor_size=20)
    nan = tlcore.stats(spoiled).first_nan
    assert nan is not None and (nan.born, nan.within) == (True, "layers.1")


def test_a_call_that_has_ended_or_never_began_is_not_named(capture: Capture) -> None:
    class Borrows(Model):
        def forward(self, x: torch.Tensor) -> Any:
            x = self.layers[1](self.layers[0](x))
            return self.get_submodule("layers.1.attn.o")(x * self.factor)

    def borrowing(factor: float) -> Model:
        torch.manual_seed(0)
        return Borrows(Layer([1.0]), Layer([1.0]), factor=factor)

    found = first(capture(borrowing(1.0)), capture(borrowing(2.0)))
    assert (*place(found), found.call) == ("layers.1.attn.o", True, "", 1)


def test_an_argument_that_was_changed_in_place(capture: Capture) -> None:
    class Spoils(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            result = x.clone()
            x.data.fill_(torch.nan)
            return result

    run = capture(nn.Sequential(nn.LayerNorm(4), Spoils()), log_post_fwd_inputs=True)
    found = tlcore.stats(run).first_nan
    assert found is not None and (found.tensor.direction, found.born) == ("post_fwd_inputs", True)


def test_a_request_is_followed_through_other_batches(tmp_path: Path) -> None:
    def serve(scale: float, order: str) -> str:
        config = load_config(output_dir=str(tmp_path), log_step_ids=[])
        session = Session(config, new_run(config))
        session.attach(root := model(scale))
        for request in order:
            row = {"request_id": f"{request}-0a1b2c3d", "external_request_id": request}
            session.begin_step()
            root(X * ord(request))
            session.end_step(rows=[{**row, "first_row": 0, "rows": 3, "first_position": 0}])
        session.close()
        return session.url

    found = first(serve(1.0, "ab"), serve(2.0, "ba"))
    assert (*place(found), found.result.request) == ("layers.1.attn.o", True, "layers.1.attn", "a")


def _tensor(rank: int, module: str, direction: str, bad: bool) -> Seen:
    return Seen(0, rank, None, module, 0, direction, (0,), (f"step_0/{module}/{direction}_{rank}",), bad)


def _entered(side: int, step: str, rank: int) -> Sequence[str]:
    return ["m", "m.a", "m.b"]


def test_a_fault_of_another_rank_is_not_taken_for_the_modules_own() -> None:
    own = [
        *(_tensor(1, "m", "inputs", False), _tensor(1, "m.a", "inputs", False)),
        *(_tensor(1, "m.a", "outputs", False), _tensor(1, "m.b", "inputs", True)),
        *(_tensor(1, "m.b", "outputs", True), _tensor(1, "m", "outputs", True)),
    ]
    assert birth(own, 3, _entered) == Birth(True, "m")
    both = [each for one in own for each in (one, replace(one, rank=0))]
    assert birth(both, 6, _entered) == Birth(True, "m")
    assert birth([*own, _tensor(0, "m.a", "outputs", True)], 3, _entered) == Birth(None)
    assert birth([*own, _tensor(0, "other", "outputs", True)], 3, _entered) == Birth(None)
    assert birth(own, 3, lambda *_: ()) == Birth(None)
