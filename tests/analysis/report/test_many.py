"""30,000 tensors: the report is made fast, and scrolling, folding and filtering it stay smooth."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import launched, opened
from tlcore.analysis.measure import EXACT, Measures
from tlcore.analysis.report import page
from tlcore.analysis.report.token_map import encoded
from tlcore.analysis.results import Comparison, TensorResult

pytestmark = pytest.mark.slow
pytest.importorskip("matplotlib")
LAYERS, COLUMNS = 15_000, 256
# A task in which the page does not answer, in milliseconds.
LONG = 200
WATCH = """new PerformanceObserver(list => {
  (window.long ??= []).push(...list.getEntries().map(each => each.duration));
}).observe({ entryTypes: ["longtask"] })"""


def result(at: int, direction: Any) -> TensorResult:
    different = at > LAYERS // 2
    parts: dict[str, Any] = {field: getattr(EXACT, field) for field in Measures.__dataclass_fields__}
    parts |= {"bitwise": False, "agrees": False, "max_abs": 1e-3, "rel_l2": at / LAYERS / 100}
    return TensorResult(
        status="different" if different else "bitwise",
        step=0,
        rank=0,
        module=f"model.layers.{at // 100}.part_{at % 100}",
        call=0,
        direction=direction,
        path=(),
        names=(f"a{at}", f"b{at}"),
        measures=Measures(**parts) if different else EXACT,
    )


def large_map() -> dict[str, Any]:
    cells = np.random.default_rng(0).integers(0, 251, (LAYERS, COLUMNS)).astype(np.uint8)
    return {
        "rows": [f"model.layers.{at // 100}.part_{at % 100} outputs" for at in range(LAYERS)],
        **{"columns": COLUMNS, "unit": "position", "first": 0, "marked": 9_000},
        "texts": [f"token{at}" for at in range(COLUMNS)],
        "cells": encoded(cells),
        "scale": {"low": -10, "decades": 14, "from": -8, "to": 0, "unit": "relative error"},
    }


def test_thirty_thousand_tensors_stay_smooth(tmp_path: Path) -> None:
    results = [result(at, direction) for at in range(LAYERS) for direction in ("inputs", "outputs")]
    began = time.process_time()
    report = tmp_path / "report.html"
    report.write_text(page(Comparison("a", "b", results)), encoding="utf-8")
    assert time.process_time() - began < 20
    assert report.stat().st_size < 10_000_000
    with launched() as browser, opened(browser, report) as (shown, troubles):
        canvas = (
            "<div class=grid><div class=scroll><div><canvas id=large tabindex=0></canvas></div></div></div>"
        )
        shown.evaluate(
            "(html) => document.querySelector('main').insertAdjacentHTML('beforeend', html)", canvas
        )
        shown.evaluate(WATCH)
        shown.evaluate("map => new Grid(large, document.createElement('p'), () => {}).show(map)", large_map())
        for act in (fold, scroll, narrow):
            assert min(longest(shown, act) for _ in range(3)) < LONG, act.__name__
        # Only what is in sight is there.
        assert shown.locator("#tree .item").count() < 60 and shown.locator("#tensors tr").count() <= 201
        assert shown.evaluate("large.height") < 2_000
    assert troubles == []


def longest(shown: Any, act: Callable[[Any], None]) -> float:
    """The longest task of what is done; other processes may have lengthened it, so it is the best of some."""
    shown.wait_for_timeout(200)
    shown.evaluate("(window.long ?? []).splice(0)")
    act(shown)
    shown.wait_for_timeout(100)
    return float(max(shown.evaluate("(window.long ?? []).splice(0)"), default=0))


def fold(shown: Any) -> None:
    shown.locator("#unfold").click()
    shown.locator("#tree").focus()
    for key in ("End", "PageUp", "Home", "ArrowLeft", "ArrowRight"):
        shown.keyboard.press(key)
    shown.locator("#foldall").click()
    shown.keyboard.press("f")


def scroll(shown: Any) -> None:
    shown.locator("#unfold").click()
    shown.locator("#tree").hover()
    for _ in range(10):
        shown.mouse.wheel(0, 20_000)
    shown.locator("#large").hover()
    for _ in range(10):
        shown.mouse.wheel(0, 9_000)
    shown.locator("#large").focus()
    for key in ("PageDown", "End", "ArrowDown"):
        shown.keyboard.press(key)


def narrow(shown: Any) -> None:
    shown.locator("#filter").press_sequentially("layers.77 outp")
    shown.locator("#only").click()
    shown.locator("#filter").fill("")
    for column in ("module", "rel L2"):
        shown.locator("#tensors th button", has_text=column).click()
