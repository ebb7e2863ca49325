"""A layer that adapters are wrapped around goes by the name that it has without them."""

from __future__ import annotations

from torch import nn

from tlcore.adapters.vllm.module_names import plain_modules, without_adapters


class WithAdapters(nn.Module):
    """As vLLM wraps a layer: the layer itself is within."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def _model(adapters: bool) -> nn.Sequential:
    layers = [nn.Embedding(3, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())]
    return nn.Sequential(*(WithAdapters(each) if adapters else each for each in layers), nn.ReLU())


def test_names_are_the_same_with_and_without_adapters() -> None:
    plain, wrapped = plain_modules(_model(False)), plain_modules(_model(True))
    assert sorted(plain) == sorted(wrapped) == ["0", "1", "1.0", "1.1", "2"]
    assert isinstance(wrapped["0"], WithAdapters) and isinstance(wrapped["1.0"], nn.Linear)


class PPMissingLayer(nn.Identity):
    """As vLLM has one in the place of each layer of another stage."""


def test_what_stands_for_a_layer_of_another_stage_is_no_module_of_that_name() -> None:
    stage = nn.Sequential(PPMissingLayer(), nn.Sequential(nn.Linear(2, 2), nn.Identity()))
    assert sorted(plain_modules(stage)) == ["1", "1.0", "1.1"]


def test_the_layer_within() -> None:
    layer = nn.Linear(2, 2)
    assert without_adapters(WithAdapters(WithAdapters(layer))) is layer
    assert without_adapters(layer) is layer
