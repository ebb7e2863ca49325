"""Runs tests with an extension that was built for AddressSanitizer and UndefinedBehaviorSanitizer.

``python -m tests.hotpath.sanitized EXTENSION PYTEST-ARGUMENTS``, with ``libasan`` preloaded.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest

NAME = "tlcore.hotpath._native"


def main(extension: str, *arguments: str) -> int:
    """Put the extension where tlcore looks for it, then run the tests; pytest's status."""
    spec = importlib.util.spec_from_file_location(NAME, extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
