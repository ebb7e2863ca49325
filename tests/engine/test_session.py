"""Capturing a plain PyTorch model: steps, calls, filters, faults, and leaving no trace."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tests.toys import Fails, Holder, Shared, hook_count, model, run


def test_outputs_are_the_same_with_and_without_capture() -> None:
    module, x = model(), torch.randn(5, 4)
    plain = module(x)
    with tlcore.capture(module, module_call_match=".", backend=MemorySink(), log_step_ids=[]):
        assert torch.equal(module(x), plain)


def test_an_in_place_module_does_not_change_what_was_captured_before_it() -> None:
    module, x = model(), torch.randn(5, 4)
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink):
        module(x)
    first = module[0](x)
    assert torch.equal(sink.tensors["step_0/0/outputs_cpu"], first)
    assert torch.equal(sink.tensors["step_0/1/outputs_cpu"], first.relu())
    assert sink.steps[0].calls == ["0", "1", "2"]


def test_weights_that_are_made_at_the_first_call_are_no_hindrance_to_it() -> None:
    module, x = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU()), torch.randn(5, 3)
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]) as capture:
        outputs = [module(x), module(x)]
    assert [step.step for step in sink.steps] == [0, 1] and capture.ledger.failed == 0
    for number, found in enumerate(outputs):
        assert torch.equal(sink.tensors[f"step_{number}/2/outputs_cpu"], found)
    assert isinstance(module[0], nn.Linear) and capture.ledger.stored == capture.ledger.captured


def test_only_the_selected_steps_are_captured_and_hooks_live_no_longer() -> None:
    module, seen = model(), []
    module[0].register_forward_hook(lambda *_: seen.append(hook_count(module)))
    sink, _ = run(module, steps=4, log_step_ids=[1, 3])
    assert [step.step for step in sink.steps] == [1, 3]
    # Somebody's hook is on the first module; behind it one of ours, for this call. On each module a stand-in.
    assert seen == [1, 1 + 1 + 3, 1, 1 + 1 + 3]
    assert hook_count(module) == 1


def test_memory_is_given_back_after_the_last_selected_step() -> None:
    module = model()
    with tlcore.capture(module, module_call_match=".", backend=MemorySink(), log_step_ids=[0, 2]) as captured:
        held = []
        for _ in range(4):
            module(torch.randn(2, 4))
            captured.session.flush()
            held.append(captured.session._pool.allocated > 0)
    assert held == [True, True, False, False]


def test_a_closed_session_keeps_no_memory_while_it_waits_to_be_collected() -> None:
    module = model()
    with tlcore.capture(module, module_call_match=".", backend=MemorySink(), log_step_ids=[]) as captured:
        module(torch.randn(2, 4))
        session = captured.session
        assert session._pool.allocated > 0
    assert session._pool.allocated == 0


def test_a_forward_that_others_wrap_while_it_is_listened_to_is_heard_once_in_later_steps() -> None:
    module = model()
    sink = MemorySink()
    wrapped: list[bool] = []

    def wrap() -> None:
        inner = module[2].forward
        module[2].forward = lambda x: inner(x) + 1

    module[0].register_forward_hook(lambda *_: None if wrapped else wrap())
    x = torch.randn(2, 4)
    plain = model()(x)
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[0, 2, 4]) as captured:
        for _ in range(5):
            result = module(x)
            wrapped.append(True)
    assert torch.equal(result, plain + 1) and torch.equal(module(x), plain + 1)
    assert [step.calls for step in sink.steps] == [["0", "1", "2"]] * 3
    assert captured.ledger.stored == captured.ledger.captured == 18
    assert torch.equal(sink.tensors["step_4/2/outputs_cpu"], plain + 1)


def test_no_step_ids_means_all_steps() -> None:
    sink, _ = run(model(), steps=3, log_step_ids=[])
    assert [step.step for step in sink.steps] == [0, 1, 2]


def test_a_submodule_called_between_steps_belongs_to_no_step() -> None:
    module = model()
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]) as captured:
        for _ in range(2):
            module(torch.randn(2, 4))
            module[0](torch.randn(2, 4))
    assert [step.calls for step in sink.steps] == [["0", "1", "2"]] * 2
    assert captured.ledger.captured == 12


def test_calls_of_a_shared_module_are_numbered() -> None:
    sink, _ = run(Shared(), size=3)
    assert sink.steps[0].calls == ["twice", "twice_1", "twice_2", "once"]


@pytest.mark.parametrize(
    ("patterns", "calls"),
    [
        ("twice:1", ["twice_1"]),
        (["twice:0", "twice:2"], ["twice", "twice_2"]),
        (["twice:1", "twice"], ["twice", "twice_1", "twice_2"]),
        ("(?:on|tw)ce:0", ["once"]),
        ("^o", ["once"]),
        ("nothing", []),
    ],
)
def test_patterns_select_exact_calls(patterns: Any, calls: list[str]) -> None:
    sink, _ = run(Shared(), size=3, module_call_match=patterns)
    assert sink.steps[0].calls == calls
    directions = {(r.module, r.call, r.direction) for r in sink.records.values()}
    assert len(directions) == 2 * len(calls)


def test_a_call_index_takes_that_calls_own_input_and_output() -> None:
    module = Shared()
    x = torch.randn(2, 3)
    sink = MemorySink()
    with tlcore.capture(module, backend=sink, module_call_match="twice:1"):
        module(x)
    first = module.twice(x)
    assert torch.equal(sink.tensors["step_0/twice_1/inputs_0_cpu"], first)
    assert torch.equal(sink.tensors["step_0/twice_1/outputs_cpu"], module.twice(first))


def test_large_tensors_are_described_not_stored() -> None:
    sink, captured = run(Shared(), size=3, max_tensor_size=5)
    assert set(sink.tensors) == {"step_0/once/outputs_cpu"}
    assert (
        sink.steps[0].structures["once/inputs.json"]["items"][0]["skipped"] == "larger than max_tensor_size"
    )
    assert captured.ledger.skipped == 7 and captured.ledger.stored == 1


def test_a_run_stops_storing_at_max_run_bytes() -> None:
    sink, captured = run(Shared(), steps=3, size=3, log_step_ids=[], max_run_bytes=100)
    assert sum(t.nbytes for t in sink.tensors.values()) <= 100
    assert captured.ledger.reasons["skipped: max_run_bytes reached"] == captured.ledger.skipped > 0
    assert len(sink.steps) == 3


def test_other_devices_are_not_captured_at_all() -> None:
    sink, captured = run(model(), device_names=["cuda:0"])
    assert sink.tensors == {} and captured.ledger.captured == 0
    assert "device_names" in sink.steps[0].structures["0/outputs.json"]["skipped"]


def test_inputs_after_the_call() -> None:
    sink = MemorySink()
    module = model()
    with tlcore.capture(module, module_call_match=".", backend=sink, log_post_fwd_inputs=True):
        module(torch.randn(2, 4))
    before = sink.tensors["step_0/1/inputs_0_cpu"]
    assert torch.equal(sink.tensors["step_0/1/post_fwd_inputs_0_cpu"], before.relu())


def test_identical_tensors_are_marked_as_aliases() -> None:
    sink, captured = run(model())
    record = sink.records["step_0/2/inputs_0_cpu"]
    assert record.alias_of == "step_0/1/outputs_cpu"
    assert captured.ledger.bytes_stored < captured.ledger.bytes_captured


def test_equal_bytes_of_another_shape_are_no_alias() -> None:
    module = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (4, 2)))
    sink, _ = run(module)
    assert sink.records["step_0/0/outputs_cpu"].alias_of is None


class Recursive(nn.Module):
    def forward(self, depth: int) -> Any:
        if depth == 0:
            return torch.zeros(1)
        return self(depth - 1) + 1


def test_a_recursive_module_pairs_each_result_with_its_call() -> None:
    sink = MemorySink()
    module = Holder(Recursive())
    with tlcore.capture(module, module_call_match=".", backend=sink):
        module(2)
    values = {name: tensor.item() for name, tensor in sink.tensors.items()}
    assert values == {
        "step_0/inner/outputs_cpu": 2.0,
        "step_0/inner_1/outputs_cpu": 1.0,
        "step_0/inner_2/outputs_cpu": 0.0,
    }


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fails = Fails(ValueError("no"))
        self.works = nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        with contextlib.suppress(ValueError):
            self.fails(x)
        return self.works(x)


def test_a_module_that_raises_keeps_its_inputs_and_says_so() -> None:
    sink, _ = run(Catches())
    structures = sink.steps[0].structures
    assert structures["fails/outputs.json"] == {"type": "object", "class": "raised builtins.ValueError"}
    assert "step_0/fails/inputs_0_cpu" in sink.tensors
    assert "step_0/works/outputs_cpu" in sink.tensors


def test_a_model_that_raises_commits_what_was_captured_and_raises_the_same() -> None:
    module = nn.Sequential(nn.Identity(), Fails(ZeroDivisionError("model's own")))
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]) as captured:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="model's own"):
                module(torch.ones(2))
    assert [step.extra["error"] for step in sink.steps] == ["builtins.ZeroDivisionError"] * 2
    assert "step_1/0/outputs_cpu" in sink.tensors
    assert captured.ledger.balanced


def test_an_interrupt_in_the_model_does_not_end_the_capture() -> None:
    failing = Fails(KeyboardInterrupt())
    module = nn.Sequential(nn.Identity(), failing)
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink, log_step_ids=[]):
        with pytest.raises(KeyboardInterrupt):
            module(torch.ones(2))
        module[1] = nn.Identity()
        module(torch.ones(2))
    assert [step.step for step in sink.steps] == [0, 1]
    assert "KeyboardInterrupt" in sink.steps[0].extra["error"] and "error" not in sink.steps[1].extra


def test_a_result_of_none_while_an_older_exception_is_handled_is_a_result() -> None:
    module = Holder(nn.Module())
    module.inner.forward = lambda: None
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink):
        try:
            raise ValueError
        except ValueError:
            module()
    assert sink.steps[0].structures["inner/outputs.json"] == {"type": "none"}
    assert "error" not in sink.steps[0].extra


def test_the_root_itself_is_no_record_even_when_it_calls_itself() -> None:
    root = Recursive()
    root.child = nn.Identity()
    sink = MemorySink()
    with tlcore.capture(root, module_call_match=".", backend=sink, log_step_ids=[]):
        root(3)
    assert len(sink.steps) == 1 and sink.steps[0].calls == []


def test_training_goes_on_under_capture() -> None:
    module = model()
    sink = MemorySink()
    with tlcore.capture(module, module_call_match=".", backend=sink):
        module(torch.randn(2, 4).requires_grad_()).sum().backward()
    assert module[0].weight.grad is not None
    assert not any(t.requires_grad for t in sink.tensors.values())


def test_inference_mode_and_autocast() -> None:
    sink = MemorySink()
    module = model()
    with (
        tlcore.capture(module, module_call_match=".", backend=sink),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        module(torch.randn(2, 4))
    assert sink.tensors["step_0/0/outputs_cpu"].dtype == torch.bfloat16


def test_a_compiled_model_is_refused() -> None:
    module = model()
    module[2].compile()
    with pytest.raises(tlcore.CaptureError, match="'2' is compiled"):
        tlcore.capture(module, module_call_match=".", backend=MemorySink()).__enter__()
    assert hook_count(module) == 0


def test_disabled_means_no_hook_no_file_no_thread(tmp_path: Any) -> None:
    module, threads = model(), threading.active_count()
    with tlcore.capture(
        module, module_call_match=".", enabled=False, output_dir=str(tmp_path / "out")
    ) as captured:
        module(torch.randn(1, 4))
        assert hook_count(module) == 0 and threading.active_count() == threads
    assert not (tmp_path / "out").exists()
    with pytest.raises(tlcore.CaptureError, match="enabled"):
        _ = captured.session
