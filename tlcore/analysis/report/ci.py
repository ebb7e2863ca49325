"""A comparison for continuous integration: JUnit XML, and a short Markdown summary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from xml.etree import ElementTree

from ...layout.names import call_name
from ..results import Comparison, TensorResult
from .text import COLUMNS, markdown, rows, verdict

_LONGEST_TABLE = 40
# What XML cannot hold.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(comparison: Comparison, name: str) -> str:
    """JUnit XML: a test for the verdict, and one for each call of a module, failed by what does not agree."""
    cases = list(_cases(comparison, name))
    failures = sum(len(case) > 0 for case in cases)
    attributes = {"name": _xml(name), "tests": str(len(cases)), "failures": str(failures), "errors": "0"}
    suite = ElementTree.Element("testsuite", attributes)
    suite.extend(cases)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _cases(comparison: Comparison, name: str) -> Iterator[ElementTree.Element]:
    lines = verdict(comparison)
    yield _case(name, "verdict", lines[0], [] if comparison.equal else lines)
    calls = groupby(
        sorted(comparison.results, key=lambda each: (each.step, each.rank, each.module, each.call)),
        key=lambda each: (each.step, each.rank, each.module, each.call),
    )
    for (step, rank, module, call), results in calls:
        bad = [each for each in results if not each.agrees]
        place = f"{name}.step_{step}" + (f".rank_{rank}" if rank else "")
        message = f"{len(bad)} tensors do not agree"
        yield _case(place, call_name(module, call), message, list(map(_line, bad)))


def _case(place: str, name: str, message: str, failure: list[str]) -> ElementTree.Element:
    case = ElementTree.Element("testcase", {"classname": _xml(place), "name": _xml(name)})
    if failure:
        found = ElementTree.SubElement(case, "failure", {"message": _xml(message)})
        found.text = _xml("\n".join(failure))
    return case


def _line(result: TensorResult) -> str:
    (cells,) = rows([result])
    return ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, cells, strict=True) if cell)


def _xml(text: str) -> str:
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def summary(comparison: Comparison) -> str:
    """The verdict as Markdown, with the first of what does not agree."""
    lines = markdown(comparison, False).splitlines()
    table = next((at for at, line in enumerate(lines) if line.startswith("| ---")), len(lines))
    kept = lines[: table + 1 + _LONGEST_TABLE]
    if len(kept) < len(lines):
        kept += ["", f"... and {len(lines) - len(kept)} more"]
    return "\n".join(kept) + "\n"
