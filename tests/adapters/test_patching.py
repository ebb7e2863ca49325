"""Patching a module whenever it becomes usable; and what merely importing the adapter costs."""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.adapters.vllm.helpers import run
from tlcore.adapters.patching import when_imported


def _patch(module: ModuleType) -> None:
    module.__dict__["patched"] = module.__dict__.get("patched", 0) + 1


def while_importing(name: str) -> None:
    """What the fixture's module calls in the midst of its import."""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that nobody has imported yet; its first line calls `while_importing`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"patched_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(
        "from tests.adapters import test_patching\n"
        "test_patching.while_importing(__name__)\n"
        "seen_within = 'patched' in globals()\n"
        "value = 1\n"
    )
    yield name
    sys.modules.pop(name, None)


def test_a_loaded_module_is_patched_at_once(name: str) -> None:
    module = importlib.import_module(name)
    when_imported(name, _patch)
    assert module.patched == 1


def test_a_module_is_patched_when_its_import_ends(name: str) -> None:
    when_imported(name, _patch)
    module = importlib.import_module(name)
    assert (module.patched, module.value, module.seen_within) == (1, 1, False)
    assert module.__spec__ is not None and type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert type(module.__loader__).__name__ == "SourceFileLoader"


def test_a_half_imported_module_is_patched_at_its_first_use(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.adapters.test_patching.while_importing", lambda own: when_imported(own, _patch)
    )
    module = importlib.import_module(name)
    assert (module.value, module.seen_within, module.patched) == (1, False, 1)
    assert type(module) is ModuleType


def test_a_module_that_cannot_be_imported_says_so() -> None:
    when_imported("tlcore_no_such_module", _patch)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("tlcore_no_such_module")


def test_the_plugin_imports_neither_torch_nor_vllm() -> None:
    done = run(
        "-c",
        "import sys, threading, tlcore.adapters.vllm as plugin\n"
        "plugin.register(); plugin.register()\n"
        "assert plugin.platform() is None\n"
        "assert not {'torch', 'vllm', 'jsonschema'} & set(sys.modules)\n"
        "assert threading.active_count() == 1\n",
    )
    assert done.returncode == 0, done.stderr
