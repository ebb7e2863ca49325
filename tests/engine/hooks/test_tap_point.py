"""`tlcore.tap`: values that the model's own code shows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlcore
from tests.sinks import MemorySink
from tests.toys import Holder, run

X = torch.randn(3, 4)


class Attention(nn.Module):
    """Shows what is no argument or result: in its ``forward``, a method, a closure and a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = tlcore.tap("q", self.q(x) * 2), self.k(x)
        for scale in (1.0, 2.0):
            tlcore.tap("scaled", k * scale)
        return self.weights(q, k) @ x

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (lambda: tlcore.tap("weights", _softmax(self, q @ k.T)))()


def _softmax(module: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """A function that is only given the module, as in transformers' attention interface."""
    return tlcore.tap("scores", scores).softmax(-1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Attention()
        self.again = self.first
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = tlcore.tap("shifted", x + 1)
        return self.again(self.last(self.first(x)))  # type: ignore[no-any-return]


def expected(model: Model) -> dict[str, torch.Tensor]:
    """What the taps show, computed by hand."""
    found = {"_root/tap.shifted": X + 1}
    x = X + 1
    for directory in ("first", "first_1"):
        q, k = model.first.q(x) * 2, model.first.k(x)
        scores = q @ k.T
        found |= {f"{directory}/tap.q": q, f"{directory}/tap.scaled": k, f"{directory}/tap.scaled_1": k * 2}
        found |= {f"{directory}/tap.scores": scores, f"{directory}/tap.weights": scores.softmax(-1)}
        x = model.last(scores.softmax(-1) @ x)
    return {f"step_0/{name}_cpu": value.detach() for name, value in found.items()}


def taps(sink: MemorySink) -> dict[str, torch.Tensor]:
    return {name: value for name, value in sink.tensors.items() if "/tap." in name}


def captured(model: nn.Module, *patterns: str, **keys: Any) -> MemorySink:
    sink = MemorySink()
    match = list(patterns) or None
    with tlcore.capture(model, backend=sink, inline=True, module_call_match=match, **keys) as capture:
        model(X)
    assert capture.ledger.balanced and not capture.ledger.failed
    return sink


@pytest.mark.parametrize("patterns", [(), (r"tap\.",), ("^first$", r"^tap\.shifted$", r"first\.tap")])
def test_taps_are_stored_beside_the_call_whose_code_shows_them(patterns: tuple[str, ...]) -> None:
    model = Model()
    found = taps(captured(model, *patterns))
    wanted = expected(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"first\.tap\.q$", ["first/tap.q", "first_1/tap.q"]),
        (r"again\.tap\.q$", ["first/tap.q", "first_1/tap.q"]),
        (r"tap\.scaled:2", ["first_1/tap.scaled"]),
        (r"weights$", ["first/tap.weights", "first_1/tap.weights"]),
        (r"^tap\.", ["_root/tap.shifted"]),
        (r"last", []),
    ],
)
def test_patterns_find_taps_by_module_and_name(pattern: str, names: list[str]) -> None:
    sink = captured(Model(), pattern)
    assert list(taps(sink)) == [f"step_0/{name}_cpu" for name in names]
    directories = list(dict.fromkeys(name.partition("/")[0] for name in names))
    assert sink.steps[0].calls == (directories or ["last"])


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_reader_finds_taps_in_their_call(tmp_path: Path, backend: str) -> None:
    model = Model()
    with tlcore.capture(model, output_dir=str(tmp_path), backend=backend, capture="both") as capture:
        model(X)
    run = tlcore.open_run(capture.url)
    run.verify()
    call = run.step(0).call("first_1")
    assert set(call.taps) == {"q", "scaled", "scaled_1", "scores", "weights"}
    wanted = expected(model)
    assert torch.equal(call.taps["scaled_1"], wanted["step_0/first_1/tap.scaled_1_cpu"])
    assert torch.equal(run.tensor("step_0/first/tap.q"), wanted["step_0/first/tap.q_cpu"])
    assert {entry["name"] for entry in run.step(0).described} == set(run.step(0).names)
    compared = tlcore.compare(capture.url, capture.url, modules=r"\.tap\.")
    assert {each.direction for each in compared.results} == {f"tap.{name}" for name in call.taps}


def test_one_that_was_not_stored_says_why(tmp_path: Path) -> None:
    model = Model()
    with tlcore.capture(model, output_dir=str(tmp_path), max_tensor_size=9) as capture:
        model(X)
    run = tlcore.open_run(capture.url)
    with pytest.raises(tlcore.ReadError, match="larger than max_tensor_size"):
        run.tensor("step_0/first/tap.scaled_1")
    assert run.tensor("step_0/first/tap.scores").shape == (3, 3)


def test_the_value_is_that_of_the_moment_and_comes_back() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            assert tlcore.tap("y", y) is y
            assert tlcore.tap("nothing", None) is None
            return y.zero_()

    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            sink = captured(Overwrites())
        assert torch.equal(sink.tensors["step_0/_root/tap.y_cpu"], X)
        assert sink.steps[0].structures["_root/tap.nothing.json"] == {"type": "none"}


def test_names_never_collide_and_cannot_leave_their_directory() -> None:
    class Names(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in range(2):
                tlcore.tap("q", x + i)
            tlcore.tap("q_1", x + 2)
            tlcore.tap("pair", (x + 3, x + 4))
            tlcore.tap("pair_0", x + 5)
            for i, name in enumerate(("../../x", "", "a_rank_1", "/", "x" * 300)):
                tlcore.tap(name, x + 6 + i)
            return x

    found = taps(captured(Names()))
    assert sorted(int((value - X).round()[0, 0]) for value in found.values()) == list(range(11))
    assert all(name.count("/") == 2 and ".." not in name.split("/") for name in found)


def test_nobody_looks_while_nothing_is_captured() -> None:
    model = Model()
    sink = MemorySink()
    with tlcore.capture(model, backend=sink, log_step_ids=[1], inline=True):
        model(X)
        assert not sink.tensors
        # Outside a step, and of no module.
        tlcore.tap("loose", X)
        model(X)
        tlcore.tap("loose", X)
    assert {name.partition("/")[0] for name in taps(sink)} == {"step_1"}
    assert not any("loose" in name for name in sink.tensors)


def test_in_a_bracket_outside_any_module_it_is_the_models_own() -> None:
    model, sink = Model(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True) as capture, capture.step():
        model.first.weights(X, X)
        tlcore.tap("loss", X.sum())
    assert list(taps(sink)) == [
        "step_0/first/tap.scores_cpu",
        "step_0/first/tap.weights_cpu",
        "step_0/_root/tap.loss_cpu",
    ]
    assert sink.steps[0].calls == ["first", "_root"]


def test_recursion_belongs_to_the_call_that_runs() -> None:
    class Recursive(nn.Module):
        def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
            if depth < 2:
                self(x + 1, depth + 1)
            return tlcore.tap("x", x)

    for patterns in ((), (r"inner\.tap",)):
        found = taps(captured(Holder(Recursive()), *patterns))
        values = {name: int((value - X).round()[0, 0]) for name, value in found.items()}
        assert values == {f"step_0/inner{end}/tap.x_cpu": n for n, end in enumerate(("", "_1", "_2"))}


def test_what_is_recomputed_for_the_backward_pass_is_not_shown_again() -> None:
    class Recomputes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def body(x: torch.Tensor) -> torch.Tensor:
                return tlcore.tap("x", x * 2).exp()

            return checkpoint(body, x, use_reentrant=False)  # type: ignore[no-any-return]

    model, sink = Recomputes(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True) as capture, capture.step():
        model(X.clone().requires_grad_()).sum().backward()
    assert list(taps(sink)) == ["step_0/_root/tap.x_cpu"]


def test_another_thread_is_counted() -> None:
    class Threaded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=self.show, args=(x,))
            thread.start()
            thread.join(60)
            return x

        def show(self, x: torch.Tensor) -> None:
            tlcore.tap("x", x)

    sink = captured(Threaded())
    assert not taps(sink)
    assert sink.steps[0].extra["calls_in_other_threads"] == {"tap.x": 1}


def test_two_captures_at_once_both_see_it_each_by_its_own_names() -> None:
    model, inner = Model(), MemorySink()
    with tlcore.capture(model.first, backend=inner, inline=True, log_step_ids=[1]):
        outer = captured(model)
    assert "step_0/first_1/tap.q_cpu" in outer.tensors
    assert torch.equal(inner.tensors["step_1/_root/tap.q_cpu"], outer.tensors["step_0/first_1/tap.q_cpu"])


def test_patterns_that_find_no_tap_are_said_at_the_end() -> None:
    model = Model()
    patterns = [r"first\.tap\.qq", r"first\.tap\.q:7"]
    with tlcore.capture(model, backend=MemorySink(), module_call_match=patterns) as capture:
        model(X)
    text = "\n".join(capture.remarks)
    assert "no tap has a name that it finds; did you mean 'first.tap.q'" in text
    assert r"'first\\.tap\\.q:7': no call that it selects was made" in text


def test_it_is_in_no_copy_and_no_hook_stays_behind() -> None:
    model = Model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with tlcore.capture(model, backend=MemorySink(), module_call_match=[r"first\.tap"], log_step_ids=[]):
        model(X)
        twin = copy.deepcopy(model)
        model(X)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(twin(X), model(X))


def _compiled(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize(
    "made",
    [
        _compiled,
        lambda model: torch.jit.trace(model, X),  # type: ignore[no-untyped-call]
        lambda model: torch.export.export(model, (X,)).module(),
        lambda model: torch.func.functionalize(model),
    ],
)
def test_without_a_capture_models_are_compiled_traced_and_exported_as_ever(made: Any) -> None:
    model = Model()
    assert torch.equal(made(model)(X), model(X))


def test_scripted_code_passes_by() -> None:
    from tlcore import tap

    class Scripted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return tap("x", x) + 1

    globals()["tap"] = tap
    try:
        assert torch.equal(torch.jit.script(Scripted())(X), X + 1)
    finally:
        del globals()["tap"]


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="this torch cannot be told to fail on compiling anew"
)
def test_steps_that_are_captured_do_not_compile_anew() -> None:
    model = Holder(Model())
    inner = model.inner
    compiled = torch.compile(lambda x: tlcore.tap("in", x * 2), fullgraph=True, backend="eager")

    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inner(compiled(x))  # type: ignore[no-any-return]

    uses = Uses()
    # As `run` calls it.
    compiled(torch.randn(2, 4))
    with torch.compiler.set_stance("fail_on_recompile"):
        sink, _ = run(uses, backend=MemorySink(), log_step_ids=[], module_call_match=None)
    assert not any("tap.in" in name for name in sink.tensors)
