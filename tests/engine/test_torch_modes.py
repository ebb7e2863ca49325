"""A captured model under torch.compile, TorchScript, export, fx, torch.func, copies and other captures."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tests.toys import hook_count
from tests.waiting import join

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

X = torch.linspace(-1, 1, 8).reshape(2, 4)
CALLS = ["0", "1", "2", "2.0"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="eager", **options)


def traced(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
    return torch.jit.trace(model, *inputs, **options)  # type: ignore[no-untyped-call]


def all_steps(model: nn.Module, sink: MemorySink | None = None) -> tuple[MemorySink, tlcore.capture]:
    sink = MemorySink() if sink is None else sink
    return sink, tlcore.capture(model, module_call_match=".", backend=sink, log_step_ids=[])


class TestCompile:
    def test_a_compiled_model_is_refused(self) -> None:
        whole, own = compiled(net()), net()
        own.compile(backend="eager")
        part = net()
        part[2].compile(backend="eager")
        wrapped = nn.Sequential(compiled(net()))
        for model, name in ((whole, "the model"), (own, "the model"), (part, "'2'"), (wrapped, "'0'")):
            before = hook_count(model)
            with pytest.raises(tlcore.CaptureError, match=f"{name} is compiled with torch.compile"):
                all_steps(model)[1].__enter__()
            assert hook_count(model) == before

    def test_a_compiled_version_runs_past_the_capture_unchanged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = net()
        before = compiled(model, fullgraph=True)
        expected = before(X)
        sink, capture = all_steps(model)
        with capture:
            assert torch.equal(before(X), expected)
            assert torch.equal(compiled(model, fullgraph=True)(X), expected)
        assert sink.steps == [] and capture.ledger.captured == 0
        assert "no call of the model came by" in caplog.text and "torch.compile'd" in caplog.text
        assert torch.equal(before(X), expected)

    @pytest.mark.parametrize("part", ["", "2", "2.0"])
    def test_compiling_within_the_block_changes_nothing_and_is_told(
        self, part: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = net()
        expected = model(X)
        sink, capture = all_steps(model)
        with capture:
            model(X)
            model.get_submodule(part).compile(backend="eager")
            for _ in range(3):
                assert torch.equal(model(X), expected)
        assert sink.steps[0].calls == CALLS
        seen = {"": None, "2": ["0", "1"], "2.0": ["0", "1", "2"]}[part]
        assert [step.calls for step in sink.steps[1:]] == ([] if seen is None else [seen] * 3)
        assert capture.ledger.balanced and capture.ledger.failed == 0
        named = f"'{part}' is compiled" if part else "the model is compiled"
        assert named in caplog.text and "what ran compiled is not in the run" in caplog.text
        assert torch.equal(model(X), expected)

    @pytest.mark.slow
    def test_the_real_compiler_gives_the_same_with_and_without_capture(self) -> None:
        model = net()
        fast = torch.compile(model)
        expected = fast(X)
        _, capture = all_steps(model)
        with capture:
            assert torch.equal(fast(X), expected)
        assert torch.equal(fast(X), expected)


class TestTorchScript:
    def test_a_scripted_or_traced_model_is_refused(self) -> None:
        for model in (torch.jit.script(net()), traced(net(), X)):
            with pytest.raises(tlcore.CaptureError, match="the model is TorchScript"):
                all_steps(model)[1].__enter__()

    @pytest.mark.parametrize("make", [torch.jit.script, lambda part: traced(part, X)])
    def test_a_scripted_part_is_captured_as_a_whole(self, make: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), make(net()))
        expected = model(X)
        sink, capture = all_steps(model)
        with capture:
            assert torch.equal(model(X), expected)
            assert torch.equal(model(X), expected)
        assert [step.calls for step in sink.steps] == [["0", "1"]] * 2
        assert torch.equal(sink.tensors["step_1/1/outputs_cpu"], expected)
        assert torch.equal(model(X), expected)

    def test_scripting_a_captured_model_works_between_steps_and_within(self) -> None:
        model = net()
        _, capture = all_steps(model)
        with capture:
            model(X)
            assert torch.equal(torch.jit.script(model)(X), model(X))
            with capture.step():
                assert torch.equal(torch.jit.script(model)(X), model(X))
        assert torch.equal(torch.jit.script(model)(X), model(X))

    def test_tracing_a_captured_model_gives_the_same_graph(self) -> None:
        class Transposes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = net()
                self.same = nn.Identity()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = self.same(self.inner(x).t())
                return result

        model = Transposes()
        plain = traced(model, X)
        sink, capture = all_steps(model)
        with capture:
            graph = traced(model, X, check_trace=False)
            assert torch.equal(graph(X), model(X))
        assert len(sink.steps) == 1
        kinds = [[node.kind() for node in each.inlined_graph.nodes()] for each in (plain, graph)]
        assert kinds[0] == kinds[1]


class TestTracers:
    @pytest.mark.parametrize("strict", [False, True])
    def test_an_exported_program_is_the_same_and_no_step(self, strict: bool) -> None:
        if strict and TORCH < (2, 6):
            pytest.skip("this torch exports strictly only models whose forward is their class's")
        model = net()
        plain = torch.export.export(model, (X,), strict=strict)
        sink, capture = all_steps(model)
        with capture:
            model(X)
            exported = torch.export.export(model, (X,), strict=strict)
            model(X)
        assert [step.calls for step in sink.steps] == [CALLS] * 2
        targets = [[str(n.target) for n in each.graph.nodes] for each in (plain, exported)]
        assert [name for name in targets[0] if "aten" in name] == [
            name for name in targets[1] if "aten" in name
        ]
        assert torch.equal(exported.module()(X), plain.module()(X))

    def test_fx_graphs_are_the_same_and_can_be_captured(self) -> None:
        model = net()
        _, capture = all_steps(model)
        with capture:
            model(X)
            graph = torch.fx.symbolic_trace(model)
        assert str(graph.graph) == str(torch.fx.symbolic_trace(net()).graph)
        sink, capture = all_steps(graph)
        with capture:
            assert torch.equal(graph(X), model(X))
        assert sink.steps[0].calls == ["0", "1", "2.0"]

    def test_make_fx_records_nothing_of_the_capture(self, caplog: pytest.LogCaptureFixture) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        model = net()
        plain = make_fx(model)(X).code
        sink, capture = all_steps(model)
        with capture:
            model(X)
            assert make_fx(model)(X).code == plain
        assert len(sink.steps) == 1
        assert "within tracing with fake tensors or proxies is not captured" in caplog.text

    def test_fake_tensors_are_no_step(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = net()
            sink, capture = all_steps(fake)
            with capture:
                assert fake(torch.empty(2, 4)).shape == (2, 2)
        assert sink.steps == []


class TestFunctional:
    def test_transforms_give_the_same_and_are_no_step(self, caplog: pytest.LogCaptureFixture) -> None:
        from torch.func import functional_call, grad, jacfwd, jacrev, vmap

        model = net()
        parameters: dict[str, torch.Tensor] = dict(model.named_parameters())

        def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = functional_call(model, values, (x,)).sum()
            return result

        def everything() -> list[torch.Tensor]:
            each = vmap(grad(loss), (None, 0))(parameters, X)
            mean = grad(loss)(parameters, X)
            return [*each.values(), *mean.values(), jacrev(model)(X), jacfwd(model)(X), vmap(model)(X)]

        expected = everything()
        sink, capture = all_steps(model)
        with capture:
            found = everything()
            functional_call(model, parameters, (X,))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert [step.calls for step in sink.steps] == [CALLS]
        assert "a torch.func transform (vmap, grad, ...) is not captured" in caplog.text

    def test_a_transform_within_the_model_is_skipped_tensor_by_tensor(self) -> None:
        class Maps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 2)
                self.after = nn.Identity()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = self.after(torch.func.vmap(self.inner)(x))
                return result

        model = Maps()
        expected = model(X)
        sink, capture = all_steps(model)
        with capture:
            assert torch.equal(model(X), expected)
        assert torch.equal(sink.tensors["step_0/after/outputs_cpu"], expected)
        counts = capture.ledger
        assert counts.balanced and counts.captured == 4 and counts.stored == 2
        assert counts.failed == 0 and counts.skipped == 2, counts.reasons


class TestCopies:
    def test_a_copy_of_a_captured_model_is_not_captured(self) -> None:
        model = net()
        sink, capture = all_steps(model)
        with capture:
            model(X)
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            copies = [
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(saved, weights_only=False),
            ]
            for each in copies:
                assert torch.equal(each(X), model(X))
        assert len(sink.steps) == 4
        for each in copies:
            assert torch.equal(each(X), model(X))
            again, capture = all_steps(each)
            with capture:
                each(X)
            assert again.steps[0].calls == CALLS
        assert model.state_dict().keys() == net().state_dict().keys()

    def test_a_copy_trains_on_its_own_parameters(self) -> None:
        model = net()
        _, capture = all_steps(model)
        with capture:
            model(X)
            twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin[2].parameters():
                parameter.zero_()
        assert torch.equal(twin(X), torch.zeros(2, 2)) and not torch.equal(model(X), torch.zeros(2, 2))


class TestSeveralCaptures:
    def test_one_model_captured_twice_and_a_part_of_it(self) -> None:
        model = net()
        expected = model(X)
        (one, first), (two, second), (three, third) = all_steps(model), all_steps(model), all_steps(model[2])
        with first, second, third:
            for _ in range(2):
                assert torch.equal(model(X), expected)
        assert one.tensors.keys() == two.tensors.keys() and len(one.tensors) == 16
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
        assert [step.calls for step in three.steps] == [["0"], ["0"]]
        assert torch.equal(three.tensors["step_0/0/outputs_cpu"], expected)
        assert hook_count(model) == 0

    @pytest.mark.parametrize("first_out", [0, 1])
    def test_captures_that_overlap_leave_the_model_as_it_was(self, first_out: int) -> None:
        model = net()
        expected = model(X)
        pairs = [all_steps(model), all_steps(model)]
        for _, capture in pairs:
            capture.__enter__()
        model(X)
        pairs[first_out][1].__exit__(None, None, None)
        assert torch.equal(model(X), expected)
        pairs[1 - first_out][1].__exit__(None, None, None)
        assert torch.equal(model(X), expected)
        assert len(pairs[first_out][0].steps) == 1 and len(pairs[1 - first_out][0].steps) == 2
        assert hook_count(model) == 0

    def test_entering_one_capture_twice_is_refused(self) -> None:
        model = net()
        _, capture = all_steps(model)
        with capture, pytest.raises(tlcore.CaptureError, match="active already"):
            capture.__enter__()
        assert hook_count(model) == 0

    def test_a_captured_model_within_a_captured_model(self) -> None:
        inner = net()
        outer = nn.Sequential(inner, nn.ReLU())
        (one, first), (two, second) = all_steps(inner), all_steps(outer)
        with first, second:
            outer(X)
            inner(X)
        assert [step.calls for step in one.steps] == [CALLS] * 2
        assert [step.calls for step in two.steps] == [["0", "0.0", "0.1", "0.2", "0.2.0", "1"]]
        assert hook_count(outer) == 0


def test_a_step_that_cannot_begin_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    expected = model(X)
    sink, capture = all_steps(model)
    with capture:
        monkeypatch.setattr(capture.session, "begin_step", lambda **keys: 1 / 0)
        assert torch.equal(model(X), expected)
        monkeypatch.undo()
        assert torch.equal(model(X), expected)
    assert len(sink.steps) == 1
    assert "a step could not be captured: ZeroDivisionError" in caplog.text


def test_many_threads_at_once_give_their_own_results(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    inputs = [torch.randn(3, 4) for _ in range(8)]
    expected = [model(x) for x in inputs]
    sink, capture = all_steps(model)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            if not torch.equal(model(inputs[number]), expected[number]):
                wrong.append(number)

    with capture, caplog.at_level(logging.ERROR):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        join(threads)
    assert wrong == []
    assert capture.ledger.balanced and capture.ledger.failed == 0
    assert 1 <= len(sink.steps) <= 320
    known = {bytes(x.numpy().data) for x in inputs}
    for step in sink.steps:
        assert step.calls == CALLS
        assert bytes(sink.tensors[f"step_{step.step}/0/inputs_0_cpu"].numpy().data) in known
