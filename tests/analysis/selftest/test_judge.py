"""The judgement itself: of rows that are right, and of faults planted in a capture of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tlcore
from tests.analysis.selftest.planting import TENSORS, rewritten
from tests.engine.samples import llama, padded
from tlcore.analysis.selftest.judge import Asked, judge
from tlcore.analysis.selftest.layers import LAYERS, layer_numbers
from tlcore.analysis.selftest.reference import Place, Reference
from tlcore.reader import Run

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 12, 13], [10, 11, 12], [20, 21, 22, 23, 24, 25, 26]]
ASKED = [Asked(str(place), prompt, len(prompt)) for place, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def reference() -> Reference:
    model = llama(num_hidden_layers=4)
    shown: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _a, out, n=number: shown.setdefault(n, []).append(out[0]))
    with torch.inference_mode():
        for prompt in PROMPTS:
            model(torch.tensor([prompt]), use_cache=False)
    return Reference(PROMPTS, {number: torch.cat(rows) for number, rows in shown.items()})


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    model, batch = llama(num_hidden_layers=4), padded(PROMPTS, left=False)
    directory = str(tmp_path_factory.mktemp("captured"))
    with (
        torch.inference_mode(),
        tlcore.capture(model, output_dir=directory, module_call_match=[LAYERS], step="outermost") as capture,
    ):
        model(**batch, use_cache=False)
    return tlcore.open_run(capture.url)


def test_what_is_right_is_right(captured: Run, reference: Reference, tmp_path: Path) -> None:
    for run in (captured, rewritten(captured, tmp_path)):
        found = judge("transformers", run, ASKED, reference, 1e-3)
        assert (found.problems, found.wrong) == ([], 0)
        assert (found.rows, found.layers, found.requests) == (4 * 20, 4, 4) and found.worst < 1e-5
        assert found.line() == f"right  80 rows of 4 requests and 4 layers, at most {found.worst:.1e} off"


WRONG = {
    "permuted": ("step 0, model.layers.0, request 0, position 0: it is ", 60),
    "two rows": ("step 0, model.layers.1, request 0, position 0: it is ", 1),
    "next layer": ("step 0, model.layers.0, request 0, position 0: it is nearest to layer 1, request 0", 60),
    "zeroed": ("step 0, model.layers.0, request 2, position 0: it is all zeros", 12),
    "overwritten": ("step 0, model.layers.3, request 0, position 0: it is 7", 20),
}


@pytest.mark.parametrize("plant", sorted(TENSORS))
def test_each_planted_fault_is_named(plant: str, captured: Run, reference: Reference, tmp_path: Path) -> None:
    found = judge("transformers", rewritten(captured, tmp_path, TENSORS[plant]), ASKED, reference, 1e-3)
    begin, least = WRONG[plant]
    assert not found.right and found.problems[0].startswith(begin), found.problems[0]
    assert found.wrong >= least and found.line().startswith(f"WRONG  {found.wrong} of 80 rows")


def test_rows_that_are_missing_or_of_other_tokens_are_named(captured: Run, reference: Reference) -> None:
    longer = [*ASKED[:3], Asked("3", [*PROMPTS[3], 9, 9, 9], 7)]
    found = judge("transformers", captured, longer, reference, 1e-3)
    assert "request 3: its token ids are not those of the answer" in found.problems
    assert any("2 rows are missing, such as that of position 7" in each for each in found.problems)
    others = [*ASKED[:3], Asked("3", [*PROMPTS[3][:6], 9], 7)]
    found = judge("transformers", captured, others, reference, 1e-3)
    assert any("there is nothing of its shape" in each for each in found.problems)
    assert any(
        "nobody asked" in each for each in judge("transformers", captured, ASKED[:3], reference, 1).problems
    )


def test_what_does_not_do_what_it_is_about_shows_nothing(captured: Run, reference: Reference) -> None:
    for way in ("alone", "chunked prefill", "prefix cache", "preempted", "compiled"):
        found = judge(way, captured, ASKED, reference, 1e-3)
        assert [each.partition(":")[0] for each in found.problems] == ["it shows nothing"], way


def test_other_layers_are_not_compared(captured: Run, reference: Reference) -> None:
    fewer = Reference(PROMPTS, {number: reference._all[number].repeat(2, 1)[:20] for number in range(3)})
    found = judge("transformers", captured, ASKED, fewer, 1e-3)
    assert found.problems == ["its layers are not those of transformers: 4 in the run, 3 in transformers"]


def test_the_layers_are_the_longest_list_of_modules() -> None:
    names = ["vision.blocks.0", "model.layers.0", "model.layers.1", "model.layers.0.experts.5", "model.norm"]
    assert layer_numbers(names) == {"model.layers.0": 0, "model.layers.1": 1}
    assert layer_numbers(["model.norm"]) == {}


def test_nearness_is_certain_or_looked_up() -> None:
    """Rows a hair apart: what float32 cannot tell is never called near."""
    rows = torch.zeros(3, 8)
    rows[:, 0] = 1e4
    rows[1, 1], rows[2, 1] = 1e-3, 1.0
    tokens = [1, 2, 3]
    made = Reference([tokens], {0: rows})
    places = [Place(0, tuple(tokens[:end])) for end in (1, 2, 3)]
    assert [made.nearest(row) for row in rows] == places
    assert (
        not made.nearer(places[0], 1e-3)
        and made.nearest(rows[0] + 0.6e-3 * (torch.arange(8) == 1)) == places[1]
    )
    far = Reference([tokens], {0: torch.eye(3, 8)})
    assert far.nearer(places[0], 0.1) and not far.nearer(places[0], 0.8)
