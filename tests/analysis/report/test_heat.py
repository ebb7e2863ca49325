"""The picture of where a tensor differs: whole rows and columns, sizes, and what is not finite."""

from __future__ import annotations

import base64
import json
import re

import numpy as np

from tlcore.analysis.report.heat import heat
from tlcore.analysis.report.sample import Sample
from tlcore.analysis.report.token_map import BROKEN, EQUAL, MOST

NONE = np.zeros(0)


def picture(rows: int, columns: int, heat_at: dict[tuple[int, int], float], broken: tuple[int, int]) -> str:
    cells, marks = (
        np.zeros((min(rows, 64), min(columns, 128))),
        np.zeros((min(rows, 64), min(columns, 128)), bool),
    )
    for at, size in heat_at.items():
        cells[at] = size
    marks[broken] = True
    return heat(Sample(rows, columns, NONE, NONE, NONE, NONE, NONE, 0.0, cells, marks), "name")


def test_axes_count_whole_rows_and_columns() -> None:
    text = picture(100, 130, {(1, 2): 1.0, (3, 4): 1e-3, (0, 0): 1e-30}, (5, 6))
    found = json.loads(re.findall(r'type="application/json">(.*?)</script>', text)[0])
    # 64 lines for 100 rows: some have one, some two, and together they are all of them.
    begins = [int(each.split(" to ")[0]) for each in found["rows"]]
    ends = [int(each.split(" to ")[-1]) for each in found["rows"]]
    assert (begins[0], ends[-1]) == (0, 99) and begins[1:] == [each + 1 for each in ends[:-1]]
    assert len(found["starts"]) == found["columns"] == 128 and found["end"] == 130
    cells = np.frombuffer(base64.b64decode(found["cells"]), np.uint8).reshape(64, 128)
    assert cells[1, 2] == MOST and cells[5, 6] == BROKEN and cells[9, 9] == EQUAL
    assert EQUAL < cells[0, 0] < cells[3, 4] < MOST
    assert "colours from 0.001 to 1" in text


def test_equal_tensors_have_a_picture() -> None:
    assert "colours" not in picture(2, 3, {}, (0, 0))
