"""A captured call again, with a live module."""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.analysis.replay import layers
from tests.analysis.replay.layers import Block, Mixes, made
from tests.engine.samples import PROMPTS, llama, run_of
from tlcore.__main__ import main
from tlcore.analysis.measure import Tolerance, measure
from tlcore.analysis.replay.again import call_in
from tlcore.analysis.replay.minimise import Smallest, minimised
from tlcore.analysis.replay.modules import Recipe
from tlcore.analysis.replay.script import write_script
from tlcore.reader import Arguments

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def captured(tmp_path: Path, model: nn.Module, given: Any = X, **keys: Any) -> str:
    with tlcore.capture(model, output_dir=str(tmp_path / "runs"), **keys) as capture, torch.no_grad():
        model(given)
    return str(capture.url)


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_where_nothing_differs_the_result_is_equal_bit_for_bit(tmp_path: Path, backend: str) -> None:
    model = made()
    url = captured(tmp_path, model, backend=backend)
    for call in tlcore.open_run(url).step(0).calls:
        if call != "_root":
            found = tlcore.replay(url, f"step_0/{call}", model.get_submodule(call))
            assert found.bitwise and "equal to what was captured" in str(found), call
    assert tlcore.replay(url, "step_0/_root", model).bitwise


def test_a_later_call_and_keywords_and_a_module_that_changes_its_input(tmp_path: Path) -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, *, by: float, also: dict[str, torch.Tensor]) -> Any:
            x.add_(by)
            return {"sum": x + also["more"], "by": by}, (x,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adds = Adds()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for by in (1.0, 2.0):
                found = self.adds(x.clone(), by=by, also={"more": x})
            result: torch.Tensor = found[0]["sum"]
            return result

    url = captured(tmp_path, Model())
    found = tlcore.replay(url, "step_0/adds_1", Adds())
    assert found.bitwise and [each.path for each in found.results] == [(0, "sum"), (1, 0)]
    assert torch.equal(found.output[0]["sum"], X + 2 + X)
    assert tlcore.replay(url, "step_0/adds_1", Adds()).bitwise


def test_a_difference_is_told_with_its_size(tmp_path: Path) -> None:
    model = made()
    url = captured(tmp_path, model)
    with torch.no_grad():
        model.get_submodule("first.mix").get_parameter("weight")[2] += 0.5
    found = tlcore.replay(url, "step_0/first", model.get_submodule("first"))
    assert not found.equal and "outputs differs from what was captured, by" in str(found)
    assert found.results[0].status == "different" and found.results[0].module == "first"
    assert tlcore.replay(url, "step_0/first", model.get_submodule("first"), rtol=10, atol=10).equal


def test_another_dtype_runs_a_copy(tmp_path: Path) -> None:
    model = made()
    url = captured(tmp_path, model)
    module = model.get_submodule("first")
    found = tlcore.replay(url, "step_0/first", module, dtype=torch.float64, device="cpu")
    assert found.equal and not found.bitwise and found.output.dtype == torch.float64
    assert found.results[0].dtypes == ("float32", "float64")
    assert next(model.parameters()).dtype == torch.float32


class OwnCache:
    pass


def test_what_was_not_stored_is_asked_for(tmp_path: Path) -> None:
    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, cache: Any = None, scale: float = 1.0) -> torch.Tensor:
            return x * scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.takes = Takes()

        def forward(self, x: torch.Tensor) -> Any:
            return self.takes(x, cache=OwnCache())

    url = captured(tmp_path, Model())
    with pytest.raises(tlcore.ReadError, match=r"argument cache is a .*OwnCache.*--set cache=JSON.* null"):
        tlcore.replay(url, "step_0/takes", Takes())
    assert tlcore.replay(url, "step_0/takes", Takes(), replace={"cache": None}).bitwise
    assert not tlcore.replay(url, "step_0/takes", Takes(), replace={"cache": None, "scale": 2.0}).equal
    with pytest.raises(tlcore.ReadError, match="no positional argument 1"):
        tlcore.replay(url, "step_0/takes", Takes(), replace={1: None})
    large = captured(tmp_path, Model(), max_tensor_size=4)
    with pytest.raises(tlcore.ReadError, match=r"argument 0 was not stored \(larger than"):
        tlcore.replay(large, "step_0/takes", Takes(), replace={"cache": None})


@pytest.mark.parametrize("call", ["", "step_x/first", "step_0", "step_0/", "0/first"])
def test_names_of_another_form_are_refused(tmp_path: Path, call: str) -> None:
    url = captured(tmp_path, made())
    with pytest.raises(tlcore.ConfigError, match=r"step_0/model\.layers\.5"):
        tlcore.replay(url, call, made())


def test_another_structure_or_shape_of_the_result_is_a_difference(tmp_path: Path) -> None:
    url = captured(tmp_path, made())
    found = tlcore.replay(url, "step_0/first", lambda x: {"more": x})
    assert {each.status for each in found.results} == {"missing"} and not found.equal
    found = tlcore.replay(url, "step_0/first", lambda x: x[:1])
    assert found.results[0].status == "different" and "shapes" in str(found)


def stored(url: str, call: str) -> Any:
    return call_in(tlcore.open_run(url), call).outputs


def wrong_at(row: int, sample: int) -> nn.Module:
    """A module whose result was wrong in one row of one sample when it was captured."""
    block = Block()

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            block.wrong = (sample, row)
            try:
                result: torch.Tensor = self.first(x)
            finally:
                block.wrong = None
            return result

    return Wrong()


def test_rows_that_show_it_alone_are_all_that_is_left(tmp_path: Path) -> None:
    model = wrong_at(3, 1)
    url = captured(tmp_path, model)
    module = model.get_submodule("first")
    found = tlcore.replay(url, "step_0/first", module)
    assert not found.equal
    smallest = minimised(found, stored(url, "step_0/first"), module, Tolerance())
    assert smallest.rows == {0: (1, 2), 1: (3, 4)}
    assert smallest.arguments.args[0].shape == (1, 1, 8)


def test_rows_that_need_those_before_them_keep_these(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes = Mixes()

        def forward(self, x: torch.Tensor) -> Any:
            return self.mixes(x)

    model = Model()
    url = captured(tmp_path, model)
    mixes = Mixes()
    mixes.from_row = 2
    found = tlcore.replay(url, "step_0/mixes", mixes)
    smallest = minimised(found, stored(url, "step_0/mixes"), mixes, Tolerance())
    first, end = smallest.rows[1]
    assert (first, end) == (0, 3) and smallest.arguments.args[0].shape == (1, 3, 8)
    equal = tlcore.replay(url, "step_0/mixes", Mixes())
    with pytest.raises(tlcore.ReadError, match="nothing differs"):
        minimised(equal, stored(url, "step_0/mixes"), Mixes(), Tolerance())


SPEC = "tests.analysis.replay.layers:Block"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_command_makes_the_module_from_class_and_weights(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made()
    url = captured(tmp_path, model)
    file = tmp_path / f"weights{suffix}"
    _save(model.state_dict(), file)
    given = ["replay", url, "step_0/first", "--module", SPEC, "--init", '{"size": 8}', "--weights", str(file)]
    assert main(given) == 0
    assert capsys.readouterr().out == "step_0/first: equal to what was captured, in every bit\n"
    with torch.no_grad():
        model.get_submodule("first.mix").get_parameter("weight")[0] += 1
    _save(model.state_dict(), file)
    assert main([*given, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["equal"] and document["results"][0]["status"] == "different"
    assert main([*given, "--atol", "100", "--dtype", "float64"]) == 0


def _save(state: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".pt":
        torch.save(state, file)
    else:
        from safetensors.torch import save_file

        save_file(state, file)


def test_a_script_shows_the_difference_without_tlcore(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = wrong_at(2, 0)
    url = captured(tmp_path, model)
    torch.save(model.get_submodule("first").state_dict(), tmp_path / "weights.pt")
    script = tmp_path / "repro" / "shows.py"
    script.parent.mkdir()
    given = ["--module", SPEC, "--init", '{"size": 8}', "--weights", str(tmp_path / "weights.pt")]
    assert main(["replay", url, "step_0/first", *given, "--minimise", str(script)]) == 1
    assert "0 to 0 of dimension 0, 2 to 2 of dimension 1" in capsys.readouterr().err
    repository = Path(__file__).parents[3]
    code = f"import sys; sys.modules['tlcore'] = None; sys.path.insert(0, {str(repository)!r})"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; import runpy; runpy.run_path({str(script)!r})"],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 1 and "outputs: (1, 1, 8), off by" in run.stdout, run.stderr
    assert "AssertionError" in run.stderr and "are not close" in run.stderr
    assert script.with_suffix(".pt").stat().st_size < 10_000


class _Calls(nn.Module):
    """A model of one module, which it gives keywords, too."""

    def __init__(self, inner: nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.keywords = inner, keywords

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x=x) if isinstance(self.inner, layers.Odd) else self.inner(x, **self.keywords)


def _replayed(
    tmp_path: Path, name: str, *more: str, keywords: dict[str, Any], dtype: Any = None
) -> tuple[int, int, Path]:
    """What replaying a module gives with its own weights, and with others, which a script is to show."""
    torch.manual_seed(0)
    inner = getattr(layers, name)().eval().to(dtype)
    script = tmp_path / "shows.py"
    weights = tmp_path / "weights.pt"
    given = ["replay", "", "step_0/inner", "--module", f"tests.analysis.replay.layers:{name}", *more]
    codes = []
    for fault in (0, 1):
        torch.save(inner.state_dict(), weights)
        # What is random is so from the seed that replaying has, too.
        model = _Calls(copy.deepcopy(inner), keywords)
        with torch.no_grad():
            model.get_parameter("inner.mix.weight")[1] += fault
        torch.manual_seed(0)
        given[1] = captured(tmp_path, model)
        codes.append(
            main([*given, "--weights", str(weights), *(["--minimise", str(script)] if fault else [])])
        )
    return codes[0], codes[1], script


@pytest.mark.parametrize(
    ("name", "more", "keys"),
    [
        ("Counts", (), {}),
        ("Random", (), {}),
        ("Narrow", ("--set", "dtype=torch.float64"), {"dtype": torch.bfloat16}),
        ("Block", ("--dtype", "float64"), {}),
    ],
)
def test_a_module_with_a_state_of_its_own_is_shown_as_it_was(
    tmp_path: Path, name: str, more: tuple[str, ...], keys: dict[str, Any]
) -> None:
    keywords = {"dtype": torch.float64} if name == "Narrow" else {}
    same, other, script = _replayed(tmp_path, name, *more, keywords=keywords, **keys)
    assert (same, other) == (0, 1)
    with pytest.raises(AssertionError, match="not close"):
        runpy.run_path(str(script))


@pytest.mark.parametrize(
    ("name", "rows"), [("Odd", " with rows 0 to 0 of dimension 0, 0 to 0 of dimension 1"), ("Quantised", "")]
)
def test_empty_results_infinities_and_quantised_weights_are_no_obstacle(
    tmp_path: Path, name: str, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other, script = _replayed(tmp_path, name, keywords={})
    assert (same, other) == (0, 1)
    assert rows in capsys.readouterr().err
    with pytest.raises(AssertionError, match="not close"):
        runpy.run_path(str(script))


def test_what_rounding_to_int8_leaves_is_nothing_to_minimise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, model = tmp_path / "shows.py", made()
    torch.save(model.get_submodule("first").state_dict(), tmp_path / "weights.pt")
    given = ["--module", SPEC, "--init", '{"size": 8}', "--weights", str(tmp_path / "weights.pt")]
    given += ["--minimise", str(script)]
    url = captured(tmp_path, model, store_dtype="int8")
    assert main(["replay", url, "step_0/first", *given]) == 2
    assert "nothing differs" in capsys.readouterr().err and not script.exists()
    with torch.no_grad():
        model.get_parameter("first.mix.weight")[1] += 1
    assert main(["replay", captured(tmp_path, model, store_dtype="int8"), "step_0/first", *given]) == 1
    with pytest.raises(AssertionError, match="not close"):
        runpy.run_path(str(script))


def test_a_script_sees_one_row_of_many_as_replaying_does(tmp_path: Path) -> None:
    recipe = Recipe("first", SPEC, {"size": 8})
    given = torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(1))
    given[0, 7] = torch.nan
    module = recipe.make()
    with torch.no_grad():
        result = module(given)
    one_row = result.clone()
    one_row[0, 3] *= 1 + 6e-6
    for expected, agrees in ((result, True), (one_row, False)):
        tolerance = Tolerance(1e-6, 0.0, norm=True)
        assert measure(expected, result, tolerance).agrees == agrees
        assert (one_row - result).nan_to_num().norm() < 1e-6 * result.nan_to_num().norm()
        smallest = Smallest(Arguments((given,), {}), {(): expected}, {})
        script, _ = write_script(tmp_path / f"{agrees}.py", smallest, recipe, "first", tolerance)
        if agrees:
            runpy.run_path(str(script))
        else:
            with pytest.raises(AssertionError, match="not close"):
                runpy.run_path(str(script))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--module", "layers"], "--module: 'layers' is no pkg.mod:Class"),
        (["--module", "no.such:Layer"], "--module: 'no.such:Layer' cannot be imported"),
        (["--module", SPEC, "--init", '{"sice": 8}'], "--init"),
        (["--module", SPEC, "--init", "[]"], "--init: must be a JSON object"),
        (["--module", "torch:ones", "--init", '{"size": [2]}'], "gives a Tensor, not a torch.nn.Module"),
        (["--module", SPEC, "--weights", "missing.pt"], "missing.pt: no weights can be read from it"),
        (["--module", SPEC, "--set", "x"], "--set: 'x' is not ARG=JSON"),
        (["--module", SPEC, "--dtype", "flot"], "--dtype: 'flot' is no dtype. Such as"),
        (["--module", SPEC, "--set", "y=1"], "first: Block: no argument 'y'"),
        (["--model", "missing"], "--model: 'missing' is no directory"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, given: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = captured(tmp_path, made())
    assert main(["replay", url, "step_0/first", *given]) == 2
    assert problem in capsys.readouterr().err


def test_a_checkpoint_has_the_calls_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "checkpoint")
    run = run_of(model, tmp_path / "runs", lambda _: model(torch.tensor(PROMPTS[:1])))
    given = ["--model", str(tmp_path / "checkpoint")]
    assert main(["replay", run.url, "step_0/model.layers.1.mlp", *given]) == 0
    assert "equal to what was captured, in every bit" in capsys.readouterr().out
    assert main(["replay", run.url, "step_0/model.layers.0.self_attn", *given]) == 2
    assert "--set past_key_values=JSON" in capsys.readouterr().err
    cache = ["--set", "past_key_values=null"]
    assert main(["replay", run.url, "step_0/model.layers.0.self_attn", *given, *cache]) == 0


def test_a_directory_without_a_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    url = captured(tmp_path, made())
    (tmp_path / "empty").mkdir()
    assert main(["replay", url, "step_0/first", "--model", str(tmp_path / "empty")]) == 2
    assert "empty' cannot be loaded" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = captured(tmp_path, made())
    torch.save({"first.other": torch.ones(1)}, tmp_path / "weights.pt")
    given = ["--module", SPEC, "--weights", str(tmp_path / "weights.pt")]
    assert main(["replay", url, "step_0/first", *given]) == 2
    assert "the weights do not fit Block" in capsys.readouterr().err
