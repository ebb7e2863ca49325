"""Training under capture: gradients and weights bit for bit those of a model that nobody looks at."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlcore
from tests.sinks import MemorySink

pytestmark = pytest.mark.slow


class Block(nn.Module):
    """An MLP with dropout whose inner part may be recomputed in backward."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute == "none":
            inner = self.inner(x)
        else:
            inner = checkpoint(self.inner, x, use_reentrant=self.recompute == "reentrant")
        result: torch.Tensor = self.norm(x + inner)
        return result


def net(recompute: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(recompute) for _ in range(3)])


def train(model: nn.Module, steps: int, capture: Any = None) -> list[torch.Tensor]:
    """Losses and gradients of a few steps of SGD with momentum."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(steps):
        x = torch.randn(4, 8, requires_grad=True)
        loss = model(x).square().sum()
        loss.backward()
        found += [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return [each for each in found if each is not None]


CALLS = [
    f"{block}{part}"
    for block in range(3)
    for part in ("", ".inner", ".inner.0", ".inner.1", ".inner.2", ".inner.3", ".norm")
]


@pytest.mark.parametrize("recompute", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("steps", [[], [0], [1, 3]])
@pytest.mark.parametrize("inline", [False, True])
def test_training_is_the_same_bit_for_bit(recompute: str, steps: list[int], inline: bool) -> None:
    """Recomputed calls come after the step's end: they are in no step, and change none."""
    model, plain = net(recompute), net(recompute)
    expected = train(plain, 4)
    sink = MemorySink()
    with tlcore.capture(
        model,
        module_call_match=".",
        backend=sink,
        log_step_ids=steps,
        log_post_fwd_inputs=True,
        inline=inline,
    ) as captured:
        found = train(model, 4)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert [step.step for step in sink.steps] == (steps or [0, 1, 2, 3])
    assert all(step.calls == CALLS for step in sink.steps)
    assert captured.ledger.stored == captured.ledger.captured == 3 * len(CALLS) * len(sink.steps)
    assert not any(tensor.requires_grad for tensor in sink.tensors.values())


def test_what_is_recomputed_within_the_models_own_call_is_no_further_call() -> None:
    class Forces(nn.Module):
        """Takes a gradient inside its forward, as a model of energies and forces does."""

        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            energy = checkpoint(self.energy, x, use_reentrant=False).sum()
            return torch.autograd.grad(energy, x)[0]

    torch.manual_seed(0)
    model = Forces()
    x = torch.randn(2, 3, requires_grad=True)
    expected = copy.deepcopy(model)(x)
    sink = MemorySink()
    with tlcore.capture(model, module_call_match=".", backend=sink, log_step_ids=[]) as captured:
        for _ in range(2):
            assert torch.equal(model(x), expected)
    assert captured.ledger.balanced and captured.ledger.failed == 0
    for step in sink.steps:
        assert step.calls == ["energy", "energy.0", "energy.1"]
    assert torch.equal(sink.tensors["step_0/energy.0/outputs_cpu"], model.energy[0](x))


def test_backward_in_another_thread_and_hooks_of_autograd() -> None:
    model, plain = net("none"), net("none")
    seen: list[torch.Tensor] = []
    sink = MemorySink()

    def note(module: nn.Module, grad_in: Any, grad_out: Any) -> None:
        seen.append(grad_out[0].clone())

    for each in (model, plain):
        each.get_submodule("1.inner.0").register_full_backward_hook(note)
    with tlcore.capture(model, module_call_match=".", backend=sink, log_step_ids=[]):
        found = train(model, 2)
    expected = train(plain, 2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert len(sink.steps) == 2


def test_gradient_accumulation_scaling_and_a_frozen_part() -> None:
    model, plain = net("non-reentrant"), net("non-reentrant")
    for each in (model, plain):
        each[0].requires_grad_(False)

    def accumulate(each: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(2)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                (each(torch.randn(4, 8, requires_grad=True)).float().sum() / 3).backward()
        return [p.grad for p in each.parameters() if p.grad is not None]

    expected = accumulate(plain)
    sink = MemorySink()
    with tlcore.capture(model, module_call_match=".", backend=sink, log_step_ids=[]) as captured:
        found = accumulate(model)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(sink.steps) == 3 and captured.ledger.failed == 0
