"""Both halves of the hot path, to be tested alike."""

from __future__ import annotations

from typing import Any

import pytest

from tlcore.hotpath.native import extension, in_use


def native() -> Any:
    """The extension; the test fails where it is not there, unless the Python half was asked for."""
    if extension is None and "is set" in in_use():
        pytest.skip(in_use())
    assert extension is not None, in_use()
    return extension
