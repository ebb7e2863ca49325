"""Both halves of the hot path, to be tested alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tlcore.hotpath.native import extension, in_use


def native() -> Any:
    """The extension; the test fails where it is not there, unless the Python half was asked for or is all."""
    if extension is None and ("is set" in in_use() or sys.version_info < (3, 11)):
        pytest.skip(in_use())
    assert extension is not None, in_use()
    return extension


def half_of(twins: Mapping[str, Callable[..., Any]]) -> Any:
    """A fixture: a function of one half, by name; ``twins`` are those of the Python half."""

    @pytest.fixture(params=["C", "Python"])
    def half(request: pytest.FixtureRequest) -> Callable[[str], Callable[..., Any]]:
        if request.param == "Python":
            return twins.__getitem__
        module = native()
        return lambda name: getattr(module, name)

    return half
