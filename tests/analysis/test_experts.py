"""The experts chosen for each token are compared as sets, with their weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.analysis import Comparison

X = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
Changed = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Gate(nn.Module):
    """Names its experts in the order of their weights, or as ``changed`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))
        self.changed: Changed = lambda weights, ids: (weights, ids)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = x @ self.weight.T
        weights, ids = logits.softmax(-1).topk(2)
        return logits, *self.changed(weights, ids)


class Experts(nn.Module):
    """What the experts would do, whatever order they are named in."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.Identity()

    def forward(
        self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        whole = torch.zeros(len(x), 6).scatter_add(1, top_k_index.long(), top_k_weights)
        # Rows as the choices say.
        self.act(x.repeat_interleave(2, 0) * top_k_index.flatten()[:, None])
        return x * (whole @ torch.arange(1.0, 7.0))[:, None]


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, ids = self.gate(x)
        found: torch.Tensor = self.experts(x, ids, top_k_weights=weights)
        return found


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.mlp(x)
        return found


def captured(out: Path, changed: Changed | None = None, model: nn.Module | None = None, **keys: Any) -> str:
    model = Model() if model is None else model
    if changed is not None:
        gate: Any = model.get_submodule("mlp.gate")
        gate.changed = changed
    with torch.inference_mode(), tlcore.capture(model, output_dir=str(out), **keys) as capture:
        model(X)
    return capture.url


def by_name(found: Comparison) -> dict[str, Any]:
    return {f"{each.module}/{each.direction}{list(each.path)}": each for each in found.results}


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_another_order_of_the_experts_is_no_divergence(backend: str, tmp_path: Path) -> None:
    a = captured(tmp_path, backend=backend)
    b = captured(tmp_path, lambda weights, ids: (weights.flip(-1), ids.flip(-1)), backend=backend)
    found = tlcore.compare(a, b)
    assert found.equal and found.first_divergence is None
    results = by_name(found)
    for name in ("gate/outputs[1]", "gate/outputs[2]", "experts/inputs[1]"):
        result = results[f"mlp.{name}"]
        assert (result.status, result.reason) == ("close", "the same experts in another order"), name
        assert result.measures.max_abs == 0
    assert results["mlp.gate/outputs[0]"].status == "bitwise"
    assert not any(each.module == "mlp.experts.act" for each in found.results)
    assert any("2 tensors within experts that were chosen otherwise" in gap for gap in found.not_compared)
    # Within a noise that has none, and where rules ask for the same bits.
    assert tlcore.compare(a, b, noise=captured(tmp_path, backend=backend)).equal
    assert tlcore.compare(a, b, rules={"tolerances": [{"match": "gate", "bitwise": True}]}).equal


def test_the_same_experts_in_another_dtype_are_in_the_same_order(tmp_path: Path) -> None:
    a = captured(tmp_path)
    found = tlcore.compare(a, captured(tmp_path, lambda weights, ids: (weights, ids.int())))
    assert found.equal and not any("within experts" in gap for gap in found.not_compared)
    for name in ("gate/outputs[1]", "gate/outputs[2]", "experts/inputs[1]"):
        assert by_name(found)[f"mlp.{name}"].reason is None
    # So what the experts compute within is compared, too.
    model = Model()
    model.mlp.experts.act = nn.ReLU()
    first = tlcore.compare(a, captured(tmp_path, lambda weights, ids: (weights, ids.int()), model))
    assert first.first_divergence is not None and first.first_divergence.module == "mlp.experts.act"


def test_weights_that_went_to_other_experts_are_found(tmp_path: Path) -> None:
    """The same numbers in both tensors, but each weight belongs to the other expert."""
    a, b = captured(tmp_path), captured(tmp_path, lambda weights, ids: (weights, ids.flip(-1)))
    found = tlcore.compare(a, b)
    results = by_name(found)
    assert results["mlp.gate/outputs[1]"].status == "different"
    assert results["mlp.gate/outputs[2]"].status == "close"
    first = found.first_divergence
    assert first is not None and (first.module, first.result.path) == ("mlp.gate", (1,))


def test_other_experts_are_named_with_their_tokens(tmp_path: Path) -> None:
    def changed(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids.clone()
        ids[3, 1] = min({0, 1, 2, 3, 4, 5} - set(ids[3].tolist()))
        return weights, ids

    a, b = captured(tmp_path), captured(tmp_path, changed)
    found = tlcore.compare(a, b)
    first = found.first_divergence
    assert first is not None and first.module == "mlp.gate" and first.born
    model = Model()
    _, _, ids = model.mlp.gate(X)
    mine = ",".join(map(str, sorted(ids[3].tolist())))
    others = ",".join(map(str, sorted(changed(X, ids)[1][3].tolist())))
    reason = by_name(found)["mlp.gate/outputs[2]"].reason
    expected = (
        f"other experts for 1 of 7 tokens: token 3: experts {{{mine}}} against {{{others}}} (a near tie,"
    )
    assert reason is not None and reason.startswith(expected), reason
    # Where further runs choose so, too, it is noise, and so is what comes of it.
    noise = [captured(tmp_path, changed), captured(tmp_path, changed)]
    assert tlcore.compare(a, b, noise=noise).equal


def test_a_swap_near_a_tie_is_told_with_the_margin(tmp_path: Path) -> None:
    def tied(lead: float) -> str:
        """Two experts are as good as each other, but for ``lead``."""
        model = Model()
        with torch.no_grad():
            weight = model.mlp.gate.weight
            weight[:4] *= 0.01
            weight[4] = X[3] / X[3].norm() ** 2 * 2
            weight[5] = X[3] / X[3].norm() ** 2
            weight[2] = weight[5] * (1 + lead)
        return captured(tmp_path, model=model)

    found = tlcore.compare(tied(1e-6), tied(-1e-6))
    result = by_name(found)["mlp.gate/outputs[2]"]
    assert result.status == "different" and result.reason is not None
    assert "token 3: experts {2,4} against {4,5} (a near tie, the logits agree" in result.reason
    margins = re.search(r"prefer these by (\S+) in A, by (\S+) in B\)", result.reason)
    assert margins is not None and all(0 < float(each) < 2e-6 for each in margins.groups())
    assert by_name(found)["mlp.gate/outputs[0]"].agrees
    # Not so where the logits themselves are apart.
    reason = by_name(tlcore.compare(tied(0.25), tied(-0.25)))["mlp.gate/outputs[2]"].reason
    assert (
        reason is not None
        and "the logits differ by up to 0.5; they prefer these by 0.25 in A, by 0.25" in reason
    )


def test_experts_of_transformers_are_compared_so(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)

    def run() -> str:
        with torch.inference_mode(), tlcore.capture(model, output_dir=str(tmp_path)) as capture:
            model(ids, use_cache=False)
        return capture.url

    a = run()
    gate = model.model.layers[0].mlp.gate
    plain = gate.forward
    gate.forward = lambda x: tuple(each.flip(-1) if at else each for at, each in enumerate(plain(x)))
    b = run()
    found = tlcore.compare(a, b)
    # Their sum is rounded in another order.
    assert found.equal, str(found)
    reordered = {each.names for each in found.results if each.reason == "the same experts in another order"}
    assert len(reordered) == 4
    assert any("within experts that were chosen otherwise" in gap for gap in found.not_compared)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[1] *= -1
    first = tlcore.compare(a, run()).first_divergence
    assert first is not None and first.module == "model.layers.0.mlp.gate"


def test_whole_numbers_elsewhere_keep_their_order(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, places = x.sort(-1, descending=self.down)
            return values, places

        down = False

    class Outer(nn.Module):
        def __init__(self, down: bool) -> None:
            super().__init__()
            self.order = Sorted()
            self.order.down = down

        def forward(self, x: torch.Tensor) -> Any:
            return self.order(x)

    a, b = captured(tmp_path, model=Outer(False)), captured(tmp_path, model=Outer(True))
    assert not tlcore.compare(a, b).equal
