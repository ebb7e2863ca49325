"""Which rows of a step's requests are kept where some of them choose for themselves."""

from __future__ import annotations

import time

import pytest
import torch

from tlcore.engine.filters.choosing import Choice, Choosing, ModuleNames
from tlcore.engine.filters.rows import StepRows
from tlcore.layout.rows import RowSet
from tlcore.layout.windows import Window

OUT = Choice(enabled=False)


@pytest.mark.parametrize(
    ("names", "found", "others"),
    [
        (["a.b"], ["a.b"], ["a.bc", "x.a.b", "a"]),
        (["layers.*.mlp"], ["layers.3.mlp", "layers.3.x.mlp"], ["layers.mlp", "layers.3.mlp.up"]),
        (["*"], ["", "anything"], []),
        (["a*a"], ["aa", "aba"], ["a"]),
        (["*.b*b"], ["x.bb", ".bxb"], ["x.b"]),
        (["_root"], [""], ["root"]),
    ],
)
def test_names_of_modules(names: list[str], found: list[str], others: list[str]) -> None:
    modules = ModuleNames(names)
    assert all(name in modules for name in found) and not any(name in modules for name in others)


def test_no_name_takes_long() -> None:
    begin = time.thread_time()
    assert "a" * 200 not in ModuleNames(["*".join("a" * 100) + "b"])
    # Tried one after the other, the ways would not end.
    assert time.thread_time() - begin < 2


def test_a_request_says_for_itself_whether_it_is_kept() -> None:
    usual = Choosing(lambda request: request == "a")
    step = usual.of_step("abc", {"a": OUT, "b": Choice(True)}, selected=True)
    assert [each for each in "abc" if step.keeps(each)] == ["b"]
    alone = usual.of_step("abc", {"b": Choice(True)}, selected=False)
    assert [each for each in "abc" if alone.keeps(each)] == ["b"] and alone.asked
    assert usual.of_step("abc", {}, selected=True) is usual
    assert not usual.of_step("abc", {"a": OUT}, selected=False).asked


def test_windows_only_narrow() -> None:
    usual = Choosing(window=Window(2, 8))
    step = usual.of_step("ab", {"a": Choice(True, window=Window(4, None))}, selected=True)
    assert step.part("a", 0, 10, 5) == (4, 4)
    assert step.part("b", 0, 10, 5) == (2, 6)
    assert step.part("a", 0, 3, 5) == (3, 0)


def _rows(**counts: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    first = 0
    for request, count in counts.items():
        found.append({"request_id": request, "first_row": first, "rows": count, "first_position": 0})
        first += count
    return found


def test_modules_differ_in_whose_rows_they_keep() -> None:
    choices = {"b": Choice(True, ModuleNames(["mlp"])), "c": Choice(True, window=Window(1))}
    rows = StepRows()
    rows.begin_step(rows.usual.of_step("abc", choices, selected=True))
    calls = iter([[("mlp", "mlp", 0)], [("norm", "norm", 0)], []])
    rows.calls_begun = lambda: next(calls)
    rows.batch("abc")
    rows.enter([RowSet("tokens", _rows(a=1, b=2, c=2))], main=True)
    tensor = torch.arange(5.0)
    kept = {}
    for module in ("mlp", "norm"):
        assert rows.hears(module)
        cut = rows.cut(tensor)
        assert cut is not None
        kept[module] = cut.tolist()
        # What nobody knows the rows of may be anybody's.
        assert (rows.cut(torch.ones(7)) is None) == (module == "norm")
    assert kept == {"mlp": [0, 1, 2, 4], "norm": [0, 4]}
    rows.note()
    document = rows.document()
    assert [(row["request_id"], row["first_row"], row["rows"]) for row in document["rows"]] == [
        ("a", 0, 1),
        ("b", 1, 2),
        ("c", 3, 1),
    ]
    (entry,) = [entry for entry in document["call_rows"] if entry["calls"] == ["norm"]]
    assert [(row["request_id"], row["first_row"]) for row in entry["sets"][0]["rows"]] == [("a", 0), ("c", 1)]


def test_a_module_that_nobody_wants_is_not_heard() -> None:
    usual = Choosing()
    alone = usual.of_step("ab", {"b": Choice(True, ModuleNames(["mlp"]))}, selected=False)
    assert alone.hears("mlp") and not alone.hears("norm")
    assert usual.of_step("ab", {"b": Choice(True, ModuleNames(["mlp"]))}, selected=True).hears("norm")
    assert usual.hears("norm")
