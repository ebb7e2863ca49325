"""A diffusion model whose weights libraries offload: its forwards come and go, what is stored is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tests.toys import hook_count
from tlcore.hotpath.intercept import is_stand_in

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")
group_hooks = pytest.importorskip("diffusers.hooks")

CPU = torch.device("cpu")
STEPS = 4
Change = Callable[[Any, Path], None]


@pytest.fixture(scope="module", autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unet() -> Any:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **blocks, **sizes).eval()


def nothing(model: Any, path: Path) -> None:
    """The model as it was made."""


def offload(model: Any, path: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def offload_to_disk(model: Any, path: Path) -> None:
    accelerate.disk_offload(model, str(path / "weights"), execution_device=CPU)


def dispatch(model: Any, path: Path) -> None:
    # A part that lies elsewhere has all the hooks that one on another device would have.
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"mid_block": "disk"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(path / "part"))


def one_block(model: Any, path: Path) -> None:
    hooks.attach_align_device_hook(model.mid_block, execution_device=CPU, offload=True)


def with_hook(model: Any, path: Path) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


def groups(model: Any, path: Path) -> None:
    group_hooks.apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


def undo(model: Any, path: Path) -> None:
    hooks.remove_hook_from_module(model, recurse=True)


ORDERS: dict[str, list[Change]] = {
    "offloaded": [offload, nothing, nothing, nothing],
    "offloaded and back": [nothing, offload, undo, offload],
    "to disk": [offload_to_disk, nothing, undo, nothing],
    "dispatched": [nothing, dispatch, undo, one_block],
    "with a hook": [nothing, with_hook, undo, offload],
    "in groups": [nothing, groups, nothing, nothing],
}


@contextmanager
def plain_hooks(model: nn.Module) -> Iterator[list[dict[str, list[torch.Tensor]]]]:
    """What forward hooks of our own see of each step, by the module's name."""
    steps: list[dict[str, list[torch.Tensor]]] = []

    def begin(module: nn.Module, args: Any) -> None:
        steps.append({})

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def seen(module: nn.Module, args: Any, output: Any) -> None:
            value = output.sample if hasattr(output, "sample") else output
            if isinstance(value, torch.Tensor):
                steps[-1].setdefault(name, []).append(value.clone())

        return seen

    handles = [model.register_forward_pre_hook(begin)]
    handles += [each.register_forward_hook(note(name)) for name, each in model.named_modules()]
    yield steps
    for handle in handles:
        handle.remove()


def denoised(model: Any, changes: list[Change], path: Path) -> torch.Tensor:
    """A few steps of a scheduler, with the model changed before each."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=10)
    scheduler.set_timesteps(STEPS)
    sample = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for change, time in zip(changes, scheduler.timesteps, strict=True):
            change(model, path)
            sample = scheduler.step(model(sample, time).sample, time, sample).prev_sample
    return sample


@pytest.mark.parametrize("selected", [[], [1, 3]], ids=["all", "odd"])
@pytest.mark.parametrize("order", list(ORDERS))
def test_offloading_between_steps_changes_nothing_of_what_is_stored(
    order: str, selected: list[int], tmp_path: Path
) -> None:
    with plain_hooks(plain := unet()) as steps:
        expected = denoised(plain, ORDERS[order], tmp_path / "plain")
    model, sink = unet(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, log_step_ids=selected) as capture:
        result = denoised(model, ORDERS[order], tmp_path / "captured")
    assert torch.equal(result, expected)
    assert capture.ledger.balanced and capture.ledger.failed == capture.ledger.dropped == 0
    assert [step.step for step in sink.steps] == (selected or list(range(STEPS)))
    for step in sink.steps:
        seen = steps[step.step]
        assert len(seen) > 40
        for name, values in seen.items():
            for number, value in enumerate(values):
                call = (name or "_root") + (f"_{number}" if number else "")
                stem = f"step_{step.step}/{call}/outputs"
                stored = sink.tensors.get(f"{stem}_cpu", sink.tensors.get(f"{stem}_sample_cpu"))
                assert stored is not None and torch.equal(stored, value), stem
    # Libraries leave a forward of their own behind; of ours nothing is.
    assert not any(is_stand_in(value) for each in model.modules() for value in vars(each).values())
    assert hook_count(model) == hook_count(plain)
