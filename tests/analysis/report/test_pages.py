"""The HTML reports in headless Chromium: self-contained, without errors, and filtering as they say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.browser import launched, opened
from tests.engine.samples import generated, llama, padded
from tests.models import tiny_llama
from tlcore.__main__ import main

AutoTokenizer: Any = pytest.importorskip("transformers").AutoTokenizer
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.linear = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.linear(self.norm(x)).relu()
        return result


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module], str]:
    x = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))

    def run(module: nn.Module) -> str:
        with tlcore.capture(module, output_dir=str(tmp_path_factory.mktemp("out"))) as captured:
            module(x)
        return captured.url

    return run


@pytest.fixture(scope="module")
def runs(dump: Callable[[nn.Module], str]) -> tuple[str, str]:
    """A run, and one with another epsilon and a NaN further on."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Block() for _ in range(12)))
    changed = copy.deepcopy(model)
    changed[4].norm.eps = 0.01
    changed[9].linear.bias.data[7] = torch.nan
    return dump(model), dump(changed)


def _visible(page: Any) -> list[str]:
    lines: list[str] = page.locator("tbody tr").all_inner_texts()
    return lines


def test_the_comparison_in_a_browser(browser: Any, runs: tuple[str, str], tmp_path: Path) -> None:
    report, picture = tmp_path / "report.html", tmp_path / "report.png"
    assert main(["compare", *runs, "--format", "html", "--output", str(report)]) == 1
    with opened(browser, report) as (page, troubles):
        page.screenshot(path=picture, full_page=True)
        assert (
            "first divergence: 4.norm, outputs of step 0; born here" in page.locator(".verdict").inner_text()
        )
        # The error by layer, and histograms and heatmap of the worst tensors, all of them visible.
        charts = [chart.bounding_box() for chart in page.locator("svg").all()]
        assert [box["width"] > 900 for box in charts] == [True] + [False] * 4
        assert all(box["width"] > 450 and box["height"] > 150 for box in charts)
        assert page.locator("#finite-B-told").inner_text().startswith("9.linear, step 0: NaN or Inf")
        titles = page.locator("h3").all_inner_texts()
        assert titles[0] == "step 0: 4.norm outputs"
        differing = _visible(page)
        assert differing and all("different" in line for line in differing)
        page.locator("#only").uncheck()
        assert len(_visible(page)) == 74
        page.locator("#filter").fill("3.norm outputs")
        (line,) = _visible(page)
        assert "bitwise" in line
        page.locator("#filter").fill("")
        page.locator("th", has_text="max abs").click()
        largest = [float(row.split("\t")[4]) for row in _visible(page)]
        assert largest == sorted(largest, reverse=True)
        # Where a tensor differs is told by row and column.
        page.locator("#heat-0").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        told = page.locator("#heat-0-told").inner_text()
        assert told.startswith("row 1, column 47: ") and told.endswith(" apart")
        # Nothing hangs over the edge of the page.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert troubles == []
    assert picture.stat().st_size > 50_000


def test_equal_runs_in_a_browser(browser: Any, runs: tuple[str, str], tmp_path: Path) -> None:
    report = tmp_path / "equal.html"
    assert main(["compare", runs[0], runs[0], "--format", "html", "--output", str(report)]) == 0
    with opened(browser, report) as (page, troubles):
        assert page.locator(".verdict").inner_text().startswith("the runs agree")
        assert len(_visible(page)) == 74
    assert troubles == []


def test_the_statistics_in_a_browser(
    browser: Any, runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "stats.html"
    assert main(["stats", runs[1], "--html", str(report)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("NaN or Inf come from 9.linear in step 0: its inputs are finite")
    assert "\nNaN first seen in 9.linear, outputs of step 0 (24 of 1152 values); born here" in said
    with opened(browser, report) as (page, troubles):
        page.screenshot(path=tmp_path / "stats.png", full_page=True)
        assert "NaN first seen in 9.linear" in page.locator(".verdict").inner_text()
        assert page.locator("svg").count() == 1
        # Who made it is framed, and the cell under the cursor.
        told = page.locator("#finite-run-told")
        assert told.inner_text() == "9.linear, step 0: NaN or Inf in its outputs"
        page.locator("#finite-run").focus()
        page.keyboard.press("ArrowUp")
        assert told.inner_text() == "9.norm, step 0: finite"
        with_nan = len(_visible(page))
        page.locator("#only").uncheck()
        assert 0 < with_nan < len(_visible(page)) == 74
    assert troubles == []


CONTRASTS = Path(__file__).with_name("contrasts.js").read_text(encoding="utf-8")
TEXT = "the quick 東 fox"


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on two generations of two prompts, of which one model has another epsilon."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    ids = [tokenizer(each)["input_ids"] for each in (TEXT, "over the lazy dog")]
    urls = []
    for epsilon in (1e-6, 1e-2):
        model = llama(vocab_size=512, eos_token_id=None)
        model.model.layers[1].input_layernorm.variance_epsilon = epsilon
        urls.append(generated(model, tmp_path_factory.mktemp("runs"), padded(ids), new=3).url)
    report = tmp_path_factory.mktemp("report") / "report.html"
    words = ["--format", "html", "--output", str(report), "--tokenizer", str(tiny_llama())]
    assert main(["compare", *urls, *words]) == 1
    return report


def cell(page: Any) -> str:
    told: str = page.locator("#cell").inner_text()
    return told


def test_the_map_in_a_browser(browser: Any, generations: Path, tmp_path: Path) -> None:
    with opened(browser, generations) as (page, troubles):
        page.screenshot(path=tmp_path / "map.png")
        assert page.locator("#which option").all_inner_texts()[:2] == [
            "step 0, request 0",
            "step 0, request 1",
        ]
        # The first divergence is framed and read first, with its token; the rest by keys alone.
        assert cell(page).startswith("model.layers.1.input_layernorm outputs, position 0 “")
        page.locator("#goto").focus()
        page.keyboard.press("Enter")
        told = []
        for _ in range(20):
            told.append(cell(page).split("“")[1].split("”: ")[0])
            page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == "map"
        assert "".join(dict.fromkeys(told)).replace("⋯", "").startswith(TEXT.replace(" ", "·"))
        assert cell(page).endswith("relative error")
        page.keyboard.press("ArrowUp")
        assert ": equal" in cell(page) and not cell(page).startswith("model.layers.1.")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert page.locator("#filter").input_value() == "model.layers.1.input_layernorm outputs"
        assert all("layers.1.input" in line for line in _visible(page))
        # The pointer reads the same cell.
        box = page.locator("#map").bounding_box()
        page.keyboard.press("Home")
        place = page.evaluate("[theme.grids[0].left, theme.grids[0].top - theme.grids[0].box.scrollTop]")
        page.mouse.move(box["x"] + place[0] + 30, box["y"] + place[1] + 14 * 8 + 5)
        assert "position 1 " in cell(page)
        page.locator("#which").select_option("1")
        # Each step and request at a glance, chosen by keys and by the pointer.
        chosen = page.locator("#steps [aria-selected=true]")
        assert chosen.inner_text() == "step 0, request 1" and page.locator("#steps .small").count() == 6
        page.locator("#steps").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert chosen.inner_text() == "step 1, request 1" and "position 5 " in cell(page)
        colour = (
            "each => each.getContext('2d').getImageData(0, each.height - 1, 1, 1).data.slice(0, 3).join(', ')"
        )
        small = page.locator("#steps .small canvas").nth(3)
        assert small.evaluate(colour) not in page.evaluate("theme.grids[0].colours.filter((_, at) => !at)")[0]
        page.locator("#steps .small").first.click()
        assert page.locator("#which").input_value() == "0"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert troubles == []


def items(page: Any) -> list[str]:
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    found: list[str] = page.locator("#tree .item .name").all_inner_texts()
    return found


def test_the_tree_in_a_browser(browser: Any, runs: tuple[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert main(["compare", *runs, "--format", "html", "--output", str(report)]) == 1
    with opened(browser, report) as (page, troubles):
        page.screenshot(path=tmp_path / "tree.png")
        # The first divergence is in sight, its siblings too; other modules are folded.
        names = items(page)
        assert names[names.index("4") + 1 :][:3] == ["norm · first divergence", "linear", "5"]
        page.locator("#foldall").click()
        assert items(page) == ["_root"] + [str(at) for at in range(12)]
        # One key from anywhere.
        page.keyboard.press("f")
        assert page.evaluate("document.activeElement.id") == "tree"
        assert page.locator("#node").inner_text().startswith("4.norm: 1 of 2 tensors do not agree, ")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert items(page)[5:7] == ["4", "5"]
        page.keyboard.press("ArrowUp")
        assert page.locator("#node").inner_text() == "3: 6 tensors, equal"
        page.keyboard.press("ArrowRight")
        assert items(page)[4:7] == ["3", "norm", "linear"]
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.locator("#filter").input_value() == "11.norm"
        # The pointer folds and finds, and a letter in the filter is a letter.
        page.locator("#tree .item", has_text="6 of 6").last.click()
        page.locator("#filter").fill("")
        page.locator("#filter").press("f")
        assert page.locator("#filter").input_value() == "f"
        selected = page.locator("#tree .item[aria-selected=true]")
        assert (
            selected.get_attribute("aria-level") == "2" and selected.get_attribute("aria-expanded") == "false"
        )
        # What is worse is told by its colour.
        colours = page.evaluate("coloursOf(JSON.parse(modules.textContent).scale)")
        swatches = page.locator("#tree .item .swatch").all()
        backgrounds = [each.evaluate("each => each.style.background") for each in swatches]
        assert backgrounds[1].replace(" ", "") == colours[0].replace(" ", "")
        assert backgrounds[0].replace(" ", "") == colours[254].replace(" ", "")
    assert troubles == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_contrast(browser: Any, generations: Path, dark: bool, tmp_path: Path) -> None:
    with opened(browser, generations, dark) as (page, troubles):
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        (background,) = page.evaluate(CONTRASTS, "body")[:1]
        assert (background["luminance"] < 0.1) == dark
        texts = page.evaluate(
            CONTRASTS, "h1, h2, h3, p, td, th button, label, button, select, span, .told, .runs"
        )
        assert len(texts) > 50
        assert [each for each in texts if each["contrast"] < 4.5] == []
        # The ink of the canvas and of the charts is that of the page.
        assert page.evaluate("theme.grids[0].ink.text") == page.evaluate("themed('--ink')")
    assert troubles == []
