"""``inject``: another run's results in the place of a model's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import nn

import tlcore
import tlcore_schemas
from tests.engine.injecting import Layer, Two, X, inject, run
from tests.engine.samples import PROMPTS, llama, padded
from tests.sinks import MemorySink
from tlcore.__main__ import main


def test_of_two_faults_the_second_is_seen_once_the_first_is_injected(tmp_path: Path) -> None:
    right, results, _ = run(tmp_path, Two())
    found = tlcore.compare(right, run(tmp_path, Two("first", "second"))[0]).first_divergence
    assert found is not None and found.module == "first"
    once, _, remarks = run(tmp_path, Two("first", "second"), inject=inject(right, "^first$"))
    compared = tlcore.compare(right, once)
    # The layer's own code still shows its fault inside; what it hands on is right.
    assert [each.status for each in compared.results if each.module == "first"] == ["bitwise"] * 3
    after = [each for each in compared.results if each.module == "second" and not each.agrees]
    assert after and after[0].direction == "outputs"
    assert any("B was injected: results of" in note for note in compared.notes)
    assert remarks[0].startswith("inject: 1 results are those of")
    both, injected, _ = run(tmp_path, Two("first", "second"), inject=inject(right, "^first$", "^second$"))
    assert torch.equal(injected[0][0], results[0][0])
    assert tlcore.compare(right, both, modules="^(first|second|last|)$").equal


def test_where_nothing_differs_nothing_changes(tmp_path: Path) -> None:
    right, results, _ = run(tmp_path, Two())
    again, injected, _ = run(tmp_path, Two(), inject=inject(right, "."))
    assert torch.equal(injected[0][0], results[0][0])
    compared = tlcore.compare(right, again)
    assert compared.equal and compared.counts["bitwise"] == len(compared.results)


def test_a_run_is_marked_wherever_it_is_listed_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, _, _ = run(tmp_path / "a", Two())
    injected, _, _ = run(tmp_path / "b", Two(), inject=inject(right, "^first$"))
    assert injected.injected == {"run": right.url, "run_id": right.id, "modules": ["^first$"]}
    assert right.injected is None
    Draft202012Validator(tlcore_schemas.load("run.v1")).validate(injected.document)
    step = injected.step(0).documents[0]
    assert step["injected"] == {"calls": 1, "left_out": {}}
    schema = tlcore_schemas.load("step.v1")["properties"]["injected"]
    Draft202012Validator(schema).validate(step["injected"])
    assert main(["ls", str(tmp_path / "b")]) == 0
    assert "complete, injected" in capsys.readouterr().out
    assert main(["ls", injected.url]) == 0
    assert "complete, injected" in capsys.readouterr().out
    assert main(["ls", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["injected"] is True
    assert main(["ls", str(tmp_path / "a")]) == 0
    assert "injected" not in capsys.readouterr().out
    for words in (
        *(["show", injected.url, name] for name in ("step_0/second", "step_0/second/inputs_0")),
        *(["show", injected.url, name, "--json"] for name in ("step_0/second", "step_0/second/inputs_0")),
        ["stats", injected.url],
        ["verify", injected.url],
        ["compare", injected.url, injected.url],
        ["compare", injected.url, injected.url, "--format", "html", "--output", str(tmp_path / "r.html")],
        ["baseline", "save", "--stats", injected.url, str(tmp_path / "b.json")],
        ["baseline", "check", str(tmp_path / "b.json"), injected.url],
    ):
        assert main(words) == 0
        said = capsys.readouterr().out
        written = [each.read_text() for each in map(Path, words[-1:]) if each.is_file()]
        assert any("injected" in each for each in (said, *written)), words
    assert main(["convert", injected.url, str(tmp_path / "c"), "--backend", "safetensors"]) == 0
    assert tlcore.open_run(tmp_path / "c" / injected.id).injected == injected.injected


def test_only_what_was_given_the_same_is_injected(tmp_path: Path) -> None:
    right, _, _ = run(tmp_path, Two(), X, X + 1, (X, 2.0))
    again, results, remarks = run(
        tmp_path, Two("first"), X, X + 2, (X, 3.0), X, inject=inject(right, "^first$")
    )
    told = [again.step(number).documents[0]["injected"] for number in again.steps]
    other = {"the model was given something else than in the other run": 1}
    assert told[0] == {"calls": 1, "left_out": {}}
    assert told[1] == told[2] == {"calls": 0, "left_out": other}
    (missing,) = told[3]["left_out"]
    assert "the other run has no arguments of the model itself in this step" in missing
    assert torch.equal(results[1][0], Two("first")(X + 2)[0])
    assert any(each.startswith("inject: 2 calls kept their own result: the model was") for each in remarks)


def test_a_run_that_has_chosen_rows_alone_is_told_as_that(tmp_path: Path) -> None:
    model = llama()
    call = padded(PROMPTS, left=False)
    with torch.no_grad():
        with tlcore.capture(model, output_dir=str(tmp_path), rows="last") as last:
            model(**call)
        keys: dict[str, Any] = {"inject": inject(last, r"layers\.0$")}
        with tlcore.capture(model, output_dir=str(tmp_path), **keys) as own:
            model(**call)
    assert own.remarks[-1].endswith("chosen rows alone of what the model was given (rows: last)")


class As(nn.Module):
    """Gives what it is given in a dtype of its own, or that plus one."""

    def __init__(self, dtype: torch.dtype, wrong: bool = False) -> None:
        super().__init__()
        self.first = AsDtype(dtype, wrong)

    def forward(self, x: torch.Tensor) -> Any:
        return self.first(x)


class AsDtype(nn.Module):
    def __init__(self, dtype: torch.dtype, wrong: bool) -> None:
        super().__init__()
        self.dtype, self.wrong = dtype, wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1 if self.wrong else x).to(self.dtype)


@pytest.mark.parametrize(
    ("stored", "own", "rounds"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.complex64, torch.complex128, False),
    ],
)
def test_another_dtype_is_never_rounded_without_a_word(
    tmp_path: Path, stored: torch.dtype, own: torch.dtype, rounds: bool
) -> None:
    right, results, _ = run(tmp_path, As(stored))
    injected, found, remarks = run(tmp_path, As(own, wrong=True), inject=inject(right, "^first$"))
    assert torch.equal(found[0], results[0].to(own)) and found[0].dtype == own
    told = injected.step(0).documents[0]["injected"]
    names = [str(each).removeprefix("torch.") for each in (stored, own)]
    assert told.get("rounded", {}) == ({f"{names[0]} to {names[1]}": 1} if rounds else {})
    assert any(f"were rounded from {names[0]} to {names[1]}" in each for each in remarks) == rounds
    Draft202012Validator(tlcore_schemas.load("step.v1")["properties"]["injected"]).validate(told)


def test_what_overflows_in_another_dtype_is_told_apart_from_what_is_rounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = torch.float16
    large = torch.tensor([[1.0, 7e4], [0.1, float("inf")]])
    right, _, _ = run(tmp_path, As(torch.float32), large, X)
    injected, found, remarks = run(tmp_path, As(own, wrong=True), large, X, inject=inject(right, "^first$"))
    assert found[0].isinf().tolist() == [[False, True], [False, True]]
    first, second = (injected.step(number).documents[0]["injected"] for number in (0, 1))
    what = "float32 to float16"
    assert first["overflowed"] == {what: 1} and "rounded" not in first
    assert second["rounded"] == {what: 1} and "overflowed" not in second
    Draft202012Validator(tlcore_schemas.load("step.v1")["properties"]["injected"]).validate(first)
    assert any(f"1 results have numbers beyond the range, {what}" in each for each in remarks)
    noted = [each for each in tlcore.compare(right, injected).notes if "beyond the range" in each]
    assert len(noted) == 1 and noted[0].startswith(
        f"B: 1 injected results have numbers beyond the range, {what}"
    )
    assert main(["ls", injected.url]) == 0
    assert f"1 injected beyond the range ({what})" in capsys.readouterr().out
    assert main(["ls", injected.url, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert steps[0]["injected_overflowed"] == {what: 1} and "injected_overflowed" not in steps[1]


def test_numbers_do_not_stand_for_whole_ones(tmp_path: Path) -> None:
    right, _, _ = run(tmp_path, As(torch.float32))
    _, found, remarks = run(tmp_path, As(torch.int64, wrong=True), inject=inject(right, "^first$"))
    assert torch.equal(found[0], (X + 1).to(torch.int64))
    assert any("the other run's result is float32, and its own int64" in each for each in remarks)


def test_results_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    right, _, _ = run(tmp_path, Two(), module_call_match=["^first$", "^$"])
    _, results, remarks = run(tmp_path, Two("first"), inject=inject(right, "^first$", "^second$"))
    assert torch.equal(results[0][0], Two()(X)[0])
    assert any("kept their own result: the other run has no result of this call" in each for each in remarks)
    large, _, _ = run(tmp_path, Two(), max_tensor_size=17)
    _, results, remarks = run(tmp_path, Two("first"), inject=inject(large, "^first$"))
    assert torch.equal(results[0][0], Two("first")(X)[0])
    assert any("the other run did not store all that the model was given" in each for each in remarks)

    class Other(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.first = Grows(size)

        def forward(self, x: torch.Tensor) -> Any:
            return self.first(x)

    class Grows(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(self.size, 1)

    grown, _, _ = run(tmp_path, Other(2))
    _, results, remarks = run(tmp_path, Other(3), inject=inject(grown, "first"))
    assert results[0].shape == (9, 6)
    assert any("kept their own result: the other run's result has another shape" in each for each in remarks)


def test_a_generation_is_injected_as_long_as_its_tokens_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = llama(), padded(PROMPTS[:1])

    def generated(**keys: Any) -> Any:
        with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[], **keys) as capture:
            ids = model.generate(**batch, max_new_tokens=5, do_sample=False)
        return tlcore.open_run(capture.url), ids

    right, ids = generated()
    layer = model.model.layers[0].self_attn
    layer.scaling *= 3
    _, other = generated()
    injected, same = generated(inject=inject(right, r"layers\.0\.self_attn$"))
    assert torch.equal(ids, same)
    told = [injected.step(number).documents[0]["injected"]["calls"] for number in injected.steps]
    assert told == [1] * len(right.steps)
    injected.dataset("model.layers.1/outputs")
    assert f"{injected.url}: a data set of a run that was injected" in caplog.text
    target = tmp_path / "exported"
    words = [
        "export",
        injected.url,
        str(target),
        "--format",
        "requests",
        "--tensor",
        "model.layers.1/outputs",
    ]
    assert main(words) == 0
    assert "the run was injected: results of" in capsys.readouterr().err
    assert "injected: results of" in json.loads((target / "_export.json").read_text())["note"]
    batch["input_ids"][0, 0] = 9
    changed, _ = generated(inject=inject(right, r"layers\.0\.self_attn$"))
    told = [changed.step(number).documents[0]["injected"] for number in changed.steps]
    assert all(each["calls"] == 0 for each in told)
    reasons = [next(iter(each["left_out"])) for each in told]
    assert reasons[0].startswith("the model was given something else")
    assert all(each.startswith("its cache goes back to a step") for each in reasons[1:])
    assert other.shape[0] == 1


def test_calls_of_one_module_are_told_apart(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self, wrong: bool) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.layer = Layer(wrong)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(self.layer(x)["pair"][0])["pair"][0]

    right, _, _ = run(tmp_path, Twice(False))
    second, _, _ = run(tmp_path, Twice(True), inject=inject(right, "^layer$:1"))
    compared = tlcore.compare(right, second, modules="^layer$")
    first = [each.agrees for each in compared.results if each.call == 0 and each.direction == "outputs"]
    assert not all(first)
    assert all(each.agrees for each in compared.results if each.call == 1 and each.direction == "outputs"
               and each.path[1] == 0)  # fmt: skip


@pytest.mark.parametrize("damage", [b"no tensor", None], ids=["damaged", "missing"])
def test_a_result_that_is_not_there_or_damaged_is_told_apart(tmp_path: Path, damage: bytes | None) -> None:
    right, _, _ = run(tmp_path, Two())
    (file,) = Path(right.url).glob("step_0/first/outputs_pair_0_cpu.pt")
    file.unlink()
    if damage is not None:
        file.write_bytes(damage)
    again, _, _ = run(tmp_path, Two("first"), inject=inject(right, "^first$"))
    (why,) = again.step(0).documents[0]["injected"]["left_out"]
    kept = "could not be read" if damage is not None else "has no result of this call"
    assert kept in why


def test_a_result_without_tensors_is_told_as_kept(tmp_path: Path) -> None:
    class Writes(nn.Module):
        """Writes into what it is given, and gives nothing."""

        def forward(self, x: torch.Tensor, given: Any) -> Any:
            x.add_(1)
            return given

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.pair, self.other = Writes(), Writes(), Writes()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            for module, given in ((self.none, None), (self.pair, (None, 1)), (self.other, slice(1))):
                module(y, given)
            return y

    right, _, _ = run(tmp_path, Outer())
    again, _, remarks = run(tmp_path, Outer(), inject=inject(right, "none|pair|other"))
    why = {"its result has no tensor": 2, "nothing can stand for a result that is a slice": 1}
    assert again.step(0).documents[0]["injected"] == {"calls": 0, "left_out": why}
    assert "inject: 2 calls kept their own result: its result has no tensor" in remarks


def test_hooks_of_others_see_what_was_injected(tmp_path: Path) -> None:
    right, _, _ = run(tmp_path, Two())
    model = Two("first")
    seen: list[Any] = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output["pair"][0]))
    with tlcore.capture(model, output_dir=str(tmp_path), inject=inject(right, "^first$")):
        model(X)
    assert torch.equal(seen[0], Two().first(X)["pair"][0])


def test_what_is_not_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        pytest.raises(tlcore.ReadError, match="missing"),
        tlcore.capture(
            Two(),
            output_dir=str(tmp_path / "new"),
            inject={"run": str(tmp_path / "missing"), "modules": ["a"]},
        ),
    ):
        pass
    assert not (tmp_path / "new").exists()
    right, _, _ = run(tmp_path, Two())
    with caplog.at_level(logging.WARNING, "tlcore"):
        _, _, remarks = run(tmp_path, Two(), inject=inject(right, "^frist$"))
    assert "inject.modules '^frist$': no module has a name that it finds; did you mean 'first'" in caplog.text
    assert remarks == ["inject: none of its modules was called"]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"inject": {"run": "a"}}, r"\$\.inject"),
        ({"inject": {"run": "a", "modules": []}}, r"\$\.inject\.modules"),
        ({"inject": {"run": "a", "modules": ["("]}}, r"\$\.inject\.modules\[0\]"),
        ({"inject": {"run": "a", "modules": ["b"], "serve": "x"}}, r"\$\.inject\.serve"),
        ({"inject": {"run": "a", "modules": ["b"]}, "compiled": "taps"}, r"\$\.inject: results can be"),
    ],
)
def test_bad_configurations_are_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(tlcore.ConfigError, match=problem):
        tlcore.capture(Two(), backend=MemorySink(), **keys)


def test_operators_are_captured_beside(tmp_path: Path) -> None:
    """The module's own code runs, and what comes behind refers to what was injected."""
    right, results, _ = run(tmp_path, Two())
    again, injected, _ = run(tmp_path, Two("first"), inject=inject(right, "^first$"), ops=["^first$", "^$"])
    assert torch.equal(injected[0][0], results[0][0])
    first, root = again.step(0).call("first"), again.step(0).call("_root")
    assert [each.name for each in first.operators] == ["mul"]
    assert torch.equal(first.result_of(first.operators[0]), Two("first").first(X)["pair"][0])
    (add,) = [each for each in root.operators if each.name == "add"]
    assert add.inputs[0] == {"from": "first/outputs_pair_0"}
    assert torch.equal(root.result_of(add), Two().first(X)["pair"][0] + X)
