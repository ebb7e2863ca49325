"""Models with positions in front of samples, packed, or sorted by experts: nobody is given another's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.engine.hooks.axis_order import packs, swaps_in_code
from tlcore.layout.unordered import is_nobodys

SAMPLES = LENGTH = 3
WIDTH = 8


class _Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class _Tokens(nn.Module):
    """Takes a batch as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, WIDTH)
        self.block = _Block()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.states(self.embed(input_ids))

    def states(self, x: torch.Tensor) -> Any:
        return self.block(x)


class _PositionsFirst(_Tokens):
    def states(self, x: torch.Tensor) -> torch.Tensor:
        return torch.transpose(self.block(x.transpose(0, 1)), 1, 0)


class _Permuted(_Tokens):
    def states(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(x.permute(1, 0, 2))
        return found.permute(1, 0, 2)


class _Encoder(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0)  # type: ignore[assignment]

    def states(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(x.movedim(0, 1))
        return found.movedim(0, 1)


class _Packed(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.GRU(WIDTH, WIDTH, batch_first=True)  # type: ignore[assignment]

    def states(self, x: torch.Tensor) -> Any:
        lengths = [x.shape[1]] * len(x)
        return self.block(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]


class _Experts(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([_Block(), _Block()])

    def states(self, x: torch.Tensor) -> torch.Tensor:
        # As many tokens as there are, those first whose first choice it is.
        order = torch.arange(x.shape[0] * x.shape[1]).flip(0)
        found = x.flatten(0, 1)[order]
        for each in self.experts:
            found = each(found)
        return found[order].view_as(x)


class _Sorting(nn.Module):
    """Experts that are one module, and work on all tokens sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = torch.arange(len(x)).flip(0)
        found: torch.Tensor = self.act_fn(tlcore.tap("sorted", x[order]) * 2)
        return found[order]


class _OneExpertEach(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"experts": _Sorting()})

    def states(self, x: torch.Tensor) -> torch.Tensor:
        given: torch.Tensor = self.mlp["experts"](x.flatten(0, 1))
        return given.view_as(x)


class _Relative(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(9, 2)

    def states(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        bias: torch.Tensor = self.relative_attention_bias(places[:, None] - places + 4)
        return x + bias.sum()


def _captured(model: nn.Module, length: int, where: Path) -> tuple[tlcore.Run, torch.Tensor]:
    ids = torch.randint(5, 60, (SAMPLES, length))
    with torch.no_grad(), tlcore.capture(model.eval(), output_dir=where) as capture:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return tlcore.open_run(capture.url), ids


@pytest.mark.parametrize("make", [_PositionsFirst, _Permuted, _Encoder, _Packed, _Experts, _Relative])
def test_whose_rows_are_not_known_nobody_is_given(make: type[_Tokens], tmp_path: Path) -> None:
    run, ids = _captured(make(), LENGTH, tmp_path)
    states = run.tensor("step_0/embed/outputs")
    for place, request in enumerate(map(run.request, run.requests)):
        assert request.token_ids.tolist() == ids[place].tolist()
        for name in request:
            if name.startswith("embed/outputs"):
                assert torch.equal(request[name], states[place])
            assert not name.startswith(("block", "experts", "relative")), name


@pytest.mark.parametrize("rows", ["all", "last"])
def test_what_experts_sort_is_nobodys_and_what_they_take_and_give_is_the_samples(
    rows: str, tmp_path: Path
) -> None:
    ids = torch.arange(15).view(3, 5) + 5
    keys: dict[str, Any] = {"output_dir": tmp_path, "ops": ["experts$"], "rows": rows}
    with torch.no_grad(), tlcore.capture(_OneExpertEach().eval(), **keys) as capture:
        capture._model(input_ids=ids, attention_mask=torch.ones_like(ids))
    run = tlcore.open_run(capture.url)
    for request in map(run.request, run.requests):
        names = {name for name in request if "experts" in name}
        assert names == {"mlp.experts/inputs_0_cpu", "mlp.experts/outputs_cpu"}
    found = {name.rpartition("/")[0] for name in run.step(0) if "act_fn" in name or "/op." in name}
    assert found == {"step_0/mlp.experts", "step_0/mlp.experts.act_fn"}


def test_what_experts_sort_is_compared_where_the_batch_is_the_same_alone(tmp_path: Path) -> None:
    model, ids = _OneExpertEach().eval(), torch.arange(15).view(3, 5) + 5

    def captured(batch: torch.Tensor) -> str:
        with torch.no_grad(), tlcore.capture(model, output_dir=tmp_path, ops=["experts$"]) as capture:
            model(input_ids=batch, attention_mask=torch.ones_like(batch))
        return capture.url

    one, same, turned = captured(ids), captured(ids), captured(ids.flip(0))
    within = {False: tlcore.compare(one, same), True: tlcore.compare(one, turned)}
    for other, comparison in within.items():
        assert comparison.equal
        compared = {each.module for each in comparison.results}
        assert ("mlp.experts.act_fn" in compared) != other and "mlp.experts" in compared
        assert any("no row per token" in note for note in comparison.not_compared) == other


@pytest.mark.parametrize("make", [_Tokens, _PositionsFirst, _Packed])
def test_where_extents_tell_the_axes_rows_are_known(make: type[_Tokens], tmp_path: Path) -> None:
    length = LENGTH if make is _Tokens else LENGTH + 1
    run, _ = _captured(make(), length, tmp_path)
    states = run.tensor("step_0/embed/outputs")
    for place, request in enumerate(map(run.request, run.requests)):
        assert torch.equal(request["embed/outputs_cpu"], states[place])
        assert ("block/outputs_cpu" in request) == (make is _Tokens)
    if make is _Tokens:
        assert torch.equal(run.request("1")["block/outputs_cpu"], states[1] + 1)


def test_code_that_exchanges_the_first_axes_is_known() -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2) + x.permute(2, 0, 1).sum() + self.generate(x)

        @torch.no_grad()
        def generate(self, x: torch.Tensor) -> torch.Tensor:
            return x.swapaxes(1, 0)

    class Unused(nn.Module):
        generate = Other.generate

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(-1, -2)

    assert swaps_in_code([nn.Linear, Other]) and not swaps_in_code([nn.Linear, _Tokens, _Block])
    assert swaps_in_code([_PositionsFirst]) and swaps_in_code([_Permuted]) and swaps_in_code([_Encoder])
    # What only other methods do says nothing of its layers.
    assert not swaps_in_code([Unused])
    assert packs(_Packed().modules()) and packs(_Encoder().modules()) and not packs(_Tokens().modules())
    assert not packs([nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)])


@pytest.mark.parametrize(
    "name",
    [
        "experts.0",
        "model.layers.0.mlp.experts.12.down_proj",
        "mlp.experts.expert_3",
        "a.local_experts.1.w1",
        "model.layers.0.mlp.experts.act_fn",
        "ffn.experts.mlp.activation_fn",
        "block_sparse_moe.input_linear",
        "block.0.SelfAttention.relative_attention_bias",
    ],
)
def test_what_has_no_rows_of_samples_is_known_by_name(name: str) -> None:
    assert is_nobodys(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "mlp.experts",
        "mlp.experts.routed_experts.quant_method",
        "mlp.experts._shared_experts.act_fn",
        "mlp.share_expert.act_fn",
        "shared_mlp.input_linear",
        "vlm_with_expert.lm_expert.layers.0",
        "mlp.shared_experts.0",
        "layers.0.expert_gate",
        "layers.0.relative_pos_embeddings",
    ],
)
def test_what_all_tokens_go_through_has_them(name: str) -> None:
    assert not is_nobodys(name)
