"""Backends by name: built in, registered, from an entry point, from an import path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tlcore
from tests.sinks import MemorySink
from tlcore import registry
from tlcore.errors import BackendError, ConfigError
from tlcore.protocols import Sink

PLUGIN = """
class Sink:
    options_schema = {"type": "object", "properties": {"level": {"type": "integer"}}}
    class Nested:
        pass
value = 3
bad = type("Bad", (), {"options_schema": {"type": "nonsense"}})
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution with a module and an entry point ``theirs``."""
    (tmp_path / "their_plugin.py").write_text(PLUGIN)
    (tmp_path / "their_broken.py").write_text("raise RuntimeError('no licence')")
    info = tmp_path / "their_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tlcore.backends]\ntheirs = their_plugin:Sink\nbroken = their_broken:Sink\npt = their_plugin:Sink\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("their_plugin", "their_broken"):
        sys.modules.pop(name, None)


def test_pt_is_built_in_and_makes_a_sink() -> None:
    backend = registry.resolve("pt")
    assert (backend.name, backend.origin, backend.portable) == ("pt", "built-in", True)
    assert backend.options_schema is not None
    assert backend.options_schema["additionalProperties"] is False
    assert isinstance(backend.factory(), Sink)


def test_a_registered_factory_is_found_and_can_be_replaced() -> None:
    tlcore.register_sink("mine", MemorySink, options_schema={"type": "object"})
    assert registry.resolve("mine").factory is MemorySink
    assert "mine" in registry.available()
    registry.register_sink("mine", lambda: MemorySink("close"))
    assert registry.resolve("mine").options_schema is None


def test_a_registered_name_does_not_reach_other_processes() -> None:
    registry.register_sink("mine", MemorySink)
    with pytest.raises(ConfigError, match=r"pkg\.mod:Sink, or declare an entry point in 'tlcore\.backends'"):
        registry.resolve("mine", portable=True)
    assert registry.resolve("pt", portable=True).portable


def test_what_is_installed_after_a_first_look_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "later" not in registry.available()
    info = tmp_path / "later-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tlcore.backends]\nlater = later:Sink\n")
    assert "later" in registry.available()


def test_entry_points_are_found_and_never_replace_a_built_in(plugin: None) -> None:
    backend = registry.resolve("theirs", portable=True)
    assert backend.origin == "entry point"
    assert backend.options_schema == {"type": "object", "properties": {"level": {"type": "integer"}}}
    assert registry.available() == ["broken", "fsspec", "pt", "safetensors", "theirs"]
    assert registry.resolve("pt").origin == "built-in"


def test_import_paths_are_followed_to_nested_names(plugin: None) -> None:
    assert registry.resolve("their_plugin:Sink").origin == "import path"
    assert registry.resolve("their_plugin:Sink.Nested").options_schema is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", "RuntimeError: no licence"),
        ("their_broken:Sink", "RuntimeError: no licence"),
        ("no_such_module:Sink", "ModuleNotFoundError"),
        ("their_plugin:Sinc", "has no attribute 'Sinc'"),
        ("their_plugin:", "AttributeError"),
        (":Sink", "ValueError"),
        ("their_plugin:value", "is a int, which cannot be called"),
    ],
)
def test_what_cannot_be_loaded_says_why(plugin: None, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        registry.resolve(name)
    assert caught.value.path == "$.backend"


def test_a_foreign_schema_that_is_none_is_refused(plugin: None) -> None:
    with pytest.raises(BackendError, match="not a JSON Schema"):
        registry.resolve("their_plugin:bad")


@pytest.mark.parametrize(("name", "hint"), [("tp", 'Did you mean "pt"?'), ("zzzz", "Available: fsspec, pt")])
def test_an_unknown_name_gives_the_nearest_and_all(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="there is no backend") as caught:
        registry.resolve(name)
    assert hint in str(caught.value)
    assert "Available: fsspec, pt" in str(caught.value)


@pytest.mark.parametrize("name", ["pt", "safetensors", "", "a:b", "a b", "-a", "a\n"])
def test_names_that_cannot_be_registered(name: str) -> None:
    with pytest.raises(BackendError):
        registry.register_sink(name, MemorySink)


def test_bad_registrations_are_refused() -> None:
    with pytest.raises(BackendError, match="not callable"):
        registry.register_sink("mine", MemorySink())  # type: ignore[arg-type]  # what is tested
    with pytest.raises(BackendError, match="not a JSON Schema"):
        registry.register_sink("mine", MemorySink, {"type": "nonsense"})
    with pytest.raises(BackendError, match="may not have 'name'"):
        registry.register_sink("mine", MemorySink, {"properties": {"name": {}}})
    assert "mine" not in registry.available()
