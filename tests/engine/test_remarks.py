"""What a capture says about that which it did not hear or could not use."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tests.toys import Holder, model, run
from tlcore.engine import remarks
from tlcore.errors import CaptureError, ConfigError
from tlcore.ledger import Counts


class Spread(nn.Module):
    """Calls its branches in threads of its own, the last part in the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def branch(module: nn.Module) -> torch.Tensor:
            with torch.no_grad():
                out: torch.Tensor = module(x)
            return out

        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(branch, self.branches))
        out: torch.Tensor = self.last(sum(parts))
        return out


def test_calls_in_other_threads_are_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    sink, captured = run(Spread(), steps=3, log_step_ids=[])
    assert [step.calls for step in sink.steps] == [["last"]] * 3
    counted = {f"branches.{i}": 1 for i in range(3)}
    assert [step.extra["calls_in_other_threads"] for step in sink.steps] == [counted] * 3
    told = [text for text in caplog.messages if "other threads" in text]
    assert len(told) == 2 and told[0].startswith("3 calls") and "of module 'branches.0'" in told[0]
    assert captured.remarks[0].startswith("9 calls in other threads than the step's own are not captured")


def test_a_model_in_several_threads_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(nn.Linear(4, 4), _Pause())
    with (
        tlcore.capture(module, module_call_match=".", backend=MemorySink(), log_step_ids=[]),
        ThreadPoolExecutor(4) as pool,
        torch.no_grad(),
    ):
        list(pool.map(module, [torch.randn(2, 4)] * 40))
    assert sum("several threads" in text for text in caplog.messages) == 1


def test_calls_of_the_model_in_other_threads_than_the_steps_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if threading.current_thread() is threading.main_thread():
                with ThreadPoolExecutor(1) as pool:
                    assert list(pool.map(module, [x] * 3)) == [1] * 3
            return x

    module = Waits()
    with tlcore.capture(module, backend=MemorySink()) as captured, torch.no_grad():
        module(torch.tensor(1))
    told = "3 steps or calls of the model came while another thread was in a step, and are not captured"
    assert any(text.startswith(told) for text in captured.remarks)
    elsewhere = "3 calls in other threads than the step's own are not captured, of the model;"
    assert any(text.startswith(elsewhere) for text in captured.remarks)


@pytest.mark.parametrize("what", ["steps", "a step and a call", "one after the other", "tasks of a step"])
def test_steps_of_several_tasks_at_once_are_told(what: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    with tlcore.capture(module, backend=MemorySink(), log_step_ids=[]) as captured:

        async def step(wait: float) -> None:
            with captured.step():
                module(torch.randn(2, 4))
                await asyncio.sleep(wait)
                module(torch.randn(2, 4))

        async def call() -> None:
            module(torch.randn(2, 4))

        async def main() -> None:
            if what == "one after the other":
                await asyncio.create_task(step(0))
                await asyncio.create_task(step(0))
            elif what == "tasks of a step":
                other = tlcore.capture(module, backend=MemorySink())
                with captured.step(), other, other.step():
                    await asyncio.gather(call(), call())
            else:
                await asyncio.gather(step(0.01), step(0.01) if what == "steps" else call())

        asyncio.run(main())
        asyncio.run(main())
    mixed = [text for text in captured.remarks if "another task" in text]
    assert len(mixed) == (what in ("steps", "a step and a call")), captured.remarks


def test_a_call_of_a_classs_own_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Doubles(nn.Linear):
        def __call__(self, x: torch.Tensor) -> Any:
            return super().__call__(x) * 2

    class Computes(nn.Module):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    module = nn.Sequential(Doubles(4, 4), Computes(), nn.Linear(4, 4))
    _, captured = run(module)
    assert len(captured.remarks) == 2
    assert "the class of module '0' has a __call__ of its own" in captured.remarks[1]
    assert "selected, but never called: 1: their class's own __call__" in captured.remarks[0]


def test_nothing_is_said_of_the_layers_of_transformers_whose_call_hands_on_what_forward_gives() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    assert type(llama.model.layers[0]).__call__ is not nn.Module.__call__
    with tlcore.capture(llama, backend=MemorySink()) as captured, torch.no_grad():
        llama(torch.ones(1, 3, dtype=torch.int64))
    assert not captured.remarks


class _Pause(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.randn(200, 200).mm(torch.randn(200, 200))
        return x


@pytest.mark.parametrize("pattern", ["^1$", "^0$:5"])
def test_a_pattern_whose_modules_never_ran_is_named(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    module = model()
    module.forward = lambda x: module[2](module[0](x))  # type: ignore[method-assign]
    run(module, module_call_match=[pattern, "2"])
    told = [text for text in caplog.messages if "no call that it selects" in text]
    assert len(told) == 1 and repr(pattern) in told[0]


def test_nothing_is_said_of_a_capture_that_heard_everything(caplog: pytest.LogCaptureFixture) -> None:
    run(model(), steps=2, log_step_ids=[], module_call_match=["0", "1", "2"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"device_names": ["cuda:3"]}, "no tensor was captured in 2 steps"),
        ({"log_step_ids": [7]}, "called 2 times, but no step of log_step_ids came"),
    ],
)
def test_a_run_without_a_tensor_says_why(
    caplog: pytest.LogCaptureFixture, keys: dict[str, Any], said: str
) -> None:
    run(model(), steps=2, **{"log_step_ids": [], **keys})
    assert any(said in text for text in caplog.messages)


@pytest.mark.parametrize("names", [["cpu"], ["cpu:0"], ["cuda:1", "cpu"]])
def test_devices_are_those_that_torch_means(names: list[str]) -> None:
    _, captured = run(model(), device_names=names)
    assert captured.ledger.captured == 6


def test_a_device_type_without_an_index_stands_for_all_of_it() -> None:
    _, captured = run(Holder(_ToMeta()), device_names=["meta"])
    assert captured.ledger.reasons == {"skipped: meta tensor holds no data": 1}


class _ToMeta(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to("meta")


def test_a_name_of_no_device_is_a_config_error(tmp_path: Any) -> None:
    with (
        pytest.raises(ConfigError, match=r"\$\.device_names: 'gpu' is no torch device: .*cuda"),
        tlcore.capture(
            model(), module_call_match=".", device_names=["gpu"], output_dir=str(tmp_path / "out")
        ),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_a_capture_that_is_not_enabled_has_an_empty_place_and_ledger() -> None:
    with tlcore.capture(model(), module_call_match=".", enabled=False) as captured:
        pass
    assert (captured.url, captured.ledger) == ("", Counts())


@pytest.mark.parametrize(
    "what", [nn.Linear, len, {}, nn.Linear(2, 2).state_dict()], ids=lambda what: str(what)[:9]
)
def test_what_is_no_model_is_refused(what: Any) -> None:
    with pytest.raises(CaptureError, match=r"is no model; give the torch\.nn\.Module"):
        tlcore.capture(what)


def test_a_sinks_class_in_the_place_of_a_sink_is_refused() -> None:
    with pytest.raises(CaptureError, match="MemorySink is a class; give an instance"):
        tlcore.capture(model(), module_call_match=".", backend=MemorySink)


class TakesNothing(MemorySink):
    def __init__(self) -> None:
        super().__init__()


def test_an_option_that_a_sink_does_not_take_is_a_config_error() -> None:
    backend = {"name": f"{__name__}:TakesNothing", "colour": "red"}
    with (
        pytest.raises(ConfigError, match=r"does not take these options: .*'colour'"),
        tlcore.capture(model(), module_call_match=".", backend=backend),
    ):
        pass


@pytest.mark.parametrize("at", ["write", "commit_step", "close"])
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_sink_raises_is_booked(at: str, kind: type[BaseException]) -> None:
    class Leaves(MemorySink):
        def _maybe_fail(self, where: str) -> None:
            if where == at:
                raise kind

    def captured() -> None:
        run(model(), backend=Leaves(), on_error="raise")

    text = "closing failed" if at == "close" else "6 tensors could not be stored"
    with pytest.raises(CaptureError, match=text):
        captured()


def test_the_run_stays_where_it_is_when_the_working_directory_changes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, place in (("dumps", tmp_path / "dumps"), ("~/dumps", tmp_path / "home/dumps")):
        with tlcore.capture(model(), module_call_match=".", output_dir=given) as captured:
            assert captured.url == f"{place}/{captured.session.run_id}"


def test_a_session_says_why_steps_fail_and_what_waits() -> None:
    class Waits(MemorySink):
        waiting = "3 files wait"

    for sink, waiting, failing in ((Waits(), "3 files wait", False), (MemorySink("write"), None, True)):
        with tlcore.capture(model(), module_call_match=".", backend=sink) as captured:
            captured.session.flush()
            assert captured.session.failing is None
            captured._model(torch.randn(2, 4))
            captured.session.flush()
            assert (captured.session.failing is not None) == failing
            assert captured.session.waiting == waiting


def test_a_step_number_comes_once() -> None:
    with tlcore.capture(model(), module_call_match=".", backend=MemorySink()) as captured:
        begin: Callable[[int], object] = captured.session.begin_step
        begin(5)
        with pytest.raises(CaptureError, match="step 5 has been; the next one is 6 or later"):
            begin(5)


class _Property(nn.Module):
    @property
    def forward(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        return torch.relu


def test_a_module_that_nothing_can_stand_in_for_is_named() -> None:
    _, captured = run(Holder(_Property()))
    assert any("forward is a property" in text for text in captured.remarks), captured.remarks


class _Splices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part: nn.Module = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> Any:
        self.part = nn.Sequential(self.part, nn.ReLU())
        return self.part(x)


def test_a_part_that_is_wrapped_while_it_runs_is_heard_and_nothing_is_said() -> None:
    sink, captured = run(_Splices())
    assert len(sink.steps[0].calls) == 4 and captured.remarks == []


class _Refuses:
    """Does not let itself be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"there is no {name}")

    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    "attribute",
    # The first is how quantized layers get a text of their own.
    [MethodType(functools.partial(lambda module: "text"), nn.ReLU()), _Refuses()],
    ids=["bound partial", "refuses"],
)
def test_whatever_attributes_modules_have_the_run_is_ended(tmp_path: Path, attribute: Any) -> None:
    module = Holder(nn.Linear(4, 4))
    module.never = nn.Linear(4, 4)
    vars(module.inner)["extra"] = attribute
    with tlcore.capture(module, output_dir=str(tmp_path)) as capture, torch.no_grad():
        out = module(torch.ones(1, 4))
    assert any("never" in text for text in capture.remarks)
    found = tlcore.open_run(capture.url)
    assert found.state == "complete" and torch.equal(found.tensor("inner/outputs_cpu"), out)


def test_a_remark_that_cannot_be_made_does_not_keep_the_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("a name")

    monkeypatch.setattr(remarks, "compiled_parts", fails)
    module = Holder(nn.Linear(4, 4))
    module.never = nn.Linear(4, 4)
    with tlcore.capture(module, output_dir=str(tmp_path)) as capture, torch.no_grad():
        module(torch.ones(1, 4))
    assert [text for text in capture.remarks if "KeyError" in text]
    assert tlcore.open_run(capture.url).state == "complete"


@pytest.mark.parametrize("keys", [{}, {"log_step_ids": [0]}, {"config": '{"log_step_ids": [0]}'}])
def test_steps_that_nobody_left_out_on_purpose_are_told_of(keys: dict[str, Any]) -> None:
    module = Holder(nn.Linear(4, 4))
    with tlcore.capture(module, backend=MemorySink(), **keys) as capture, torch.no_grad():
        for _ in range(3):
            module(torch.ones(1, 4))
    said = [text for text in capture.remarks if "1 of 3 steps" in text]
    assert bool(said) != bool(keys)


def test_a_last_step_that_cannot_be_ended_leaves_the_steps_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise KeyError("a row")

    module = Holder(nn.Linear(4, 4))
    with tlcore.capture(module, output_dir=str(tmp_path), log_step_ids=[]) as capture, torch.no_grad():
        module(torch.ones(1, 4))
        capture.session.begin_step()
        monkeypatch.setattr(capture.session.rows, "document", fails)
        capture.session.detach()
    found = tlcore.open_run(capture.url)
    assert found.state == "complete" and list(found.steps) == [0]
    assert any("its last step is lost" in text for text in caplog.messages)
    assert "forward" not in vars(module.inner)
