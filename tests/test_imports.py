"""The direction of imports, read from the syntax tree: no room imports one above it, and none in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tlcore import registry
from tlcore.protocols import Sink, Source
from tlcore.storage import Location
from tlcore.testing import MemoryStore

ROOT = Path(__file__).parents[1]
FOLDERS = {"tlcore": ROOT / "tlcore", "tlcore_backends": ROOT / "backends" / "tlcore_backends"}
FOLDERS["tlcore_schemas"] = ROOT / "schemas" / "tlcore_schemas"

# A lower line never imports a higher one.
ORDER: list[set[str]] = [
    {"tlcore.hotpath", "tlcore.errors", "tlcore.locations", "tlcore._version", "tlcore_schemas"}
    | {"tlcore.storage"},
    {"tlcore.layout"},
    {"tlcore.statistics", "tlcore.ledger"},
    {"tlcore.record"},
    {"tlcore.alike", "tlcore.checking"},
    {"tlcore.protocols"},
    {"tlcore.registry", "tlcore.config.validation"},
    {"tlcore.config", "tlcore.reader", "tlcore_backends"},
    {"tlcore.engine", "tlcore.analysis", "tlcore.runs"},
    {"tlcore.adapters", "tlcore.viewer", "tlcore.cli", "tlcore.testing"},
    {"tlcore", "tlcore.__main__", "tlcore.vllm", "tlcore.compare_il"},
]
ENGINE: list[set[str]] = [
    {"filters"},
    {"staging"},
    {"calls", "batch"},
    {"hooks", "pipeline"},
    {"new_run"},
    {"session"},
    {"capture"},
]
VLLM: list[set[str]] = [
    {"internals", "carrier", "metrics", "module_names", "plugins"},
    {"compiled", "frontend"},
    {"worker"},
]


def level(name: str, order: list[set[str]], prefix: str = "") -> int | None:
    """The line of the order that a dotted name belongs to; the most exact entry wins."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        entry = ".".join(parts[:end])
        for number, names in enumerate(order):
            if entry in {prefix + each for each in names}:
                return number
    return None


def imports(file: Path, package: str) -> Iterator[str]:
    """The absolute dotted names a file imports, lazy and type-only imports included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def sources() -> dict[str, tuple[Path, bool]]:
    """Every module of ours by its dotted name: its file, and whether it is a package."""
    found = {}
    for top, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [top, *file.relative_to(folder).with_suffix("").parts]
            package = parts[-1] == "__init__"
            found[".".join(parts[:-1] if package else parts)] = (file, package)
    return found


SOURCES = sources()


def targets(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    file, is_package = SOURCES[module]
    found = set()
    for name in imports(file, module if is_package else module.rpartition(".")[0]):
        parts = name.split(".")
        while parts and ".".join(parts) not in SOURCES:
            parts.pop()
        if parts:
            found.add(".".join(parts))
    return found - {module}


EDGES = {module: targets(module) for module in SOURCES}


def assert_downwards(order: list[set[str]], prefix: str = "") -> None:
    for module, imported in EDGES.items():
        own = level(module, order, prefix)
        for target in imported:
            other = level(target, order, prefix)
            if own is not None and other is not None:
                assert other <= own, f"{module} imports {target} from a higher room"


def test_every_module_has_its_line_in_the_order() -> None:
    beside = [
        module
        for module in SOURCES
        if module.startswith("tlcore.") and level(module, [*ORDER[:-1], ORDER[-1] - {"tlcore"}]) is None
    ]
    assert beside == []


def test_imports_point_downwards() -> None:
    assert_downwards(ORDER)


def test_inside_the_engine_imports_point_downwards() -> None:
    assert_downwards(ENGINE, "tlcore.engine.")


def test_inside_the_vllm_adapter_imports_point_downwards() -> None:
    assert_downwards(VLLM, "tlcore.adapters.vllm.")


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    # The public door names everything for type checkers, and loads it on first use.
    edges = {
        name: {each for each in found if each.startswith(("tlcore.engine", "tlcore.analysis"))}
        for name, found in EDGES.items()
        if name != "tlcore"
    }
    while leaves := {name for name, found in edges.items() if not found}:
        edges = {name: found - leaves for name, found in edges.items() if name not in leaves}
    assert edges == {}


@pytest.mark.parametrize("folder", ["tlcore.engine", "tlcore.adapters.vllm", "tlcore.analysis"])
def test_folders_do_not_import_each_other_in_a_circle(folder: str) -> None:
    depth = folder.count(".") + 2
    edges: dict[str, set[str]] = {}
    for module, imported in EDGES.items():
        if module.startswith(f"{folder}."):
            room = ".".join(module.split(".")[:depth])
            rooms = {".".join(each.split(".")[:depth]) for each in imported if each.startswith(f"{folder}.")}
            edges.setdefault(room, set()).update(rooms - {room})
    while leaves := {name for name, found in edges.items() if not found & edges.keys()}:
        edges = {name: found - leaves for name, found in edges.items() if name not in leaves}
    assert edges == {}


def test_hooks_and_pipeline_never_import_each_other() -> None:
    for one, other in (("hooks", "pipeline"), ("pipeline", "hooks")):
        for module, imported in EDGES.items():
            if module.startswith(f"tlcore.engine.{one}"):
                assert not [name for name in imported if name.startswith(f"tlcore.engine.{other}")], module


def test_the_hot_path_imports_nothing_of_ours() -> None:
    for module, imported in EDGES.items():
        if module.startswith("tlcore.hotpath"):
            assert not [name for name in imported if not name.startswith("tlcore.hotpath")], module


def test_the_engine_and_the_reader_name_no_backend() -> None:
    for module, imported in EDGES.items():
        if module.startswith(("tlcore.engine", "tlcore.reader")):
            assert not [name for name in imported if name.startswith("tlcore_backends")], module


def test_built_in_backends_are_named_in_the_registry_alone() -> None:
    for module, (file, _) in SOURCES.items():
        text = file.read_text(encoding="utf-8")
        if not module.startswith("tlcore.") or module == "tlcore.registry" or "tlcore_backends" not in text:
            continue
        assert module.startswith(("tlcore.runs", "tlcore.cli")), f"{module} names a backend"
        plain = [name for name in imports(file, module) if name.startswith("tlcore_backends")]
        lines = [line for line in text.splitlines() if "tlcore_backends" in line]
        assert plain and all(line.startswith(("from ", "import ")) for line in lines), module


def test_what_a_sink_or_store_can_do_is_asked_by_protocols_alone() -> None:
    for module, (file, _) in SOURCES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            asked = ast.unparse(node)
            if node.func.id == "isinstance":
                assert not asked.endswith(("LocalStore)", "SpillStore)", "FsspecStore)")), (
                    f"{module}: {asked}"
                )
            if node.func.id in ("hasattr", "getattr") and module.startswith(
                ("tlcore.engine", "tlcore.reader")
            ):
                first = ast.unparse(node.args[0]).lower()
                assert not first.endswith(("store", "sink", "source")), f"{module}: {asked}"


def test_every_built_in_entry_of_the_registry_is_what_it_should_be() -> None:
    stores = {*registry._BUILT_IN_STORES.values(), registry._FSSPEC_STORE, registry._SPILL_STORE}
    for target in [*stores, *(each for sides in registry._BUILT_IN.values() for each in sides if each)]:
        assert callable(registry._import_target(target)), target
    for name in registry._BUILT_IN:
        backend = registry.resolve(name)
        assert isinstance(backend.factory(), Sink)
        assert isinstance(backend.located({}, "runs"), Location)
        reader = registry.resolve(backend.written_as({}))
        assert isinstance(reader.open_source(MemoryStore(), {"world_size": 1}), Source)


def test_every_foreign_format_of_the_registry_is_one() -> None:
    for name, target in registry._FOREIGN.items():
        found: Any = registry._import_target(target)
        assert found.tool == name
        assert found.recognise(registry._import_target(registry._DUMP_FILES)(MemoryStore())) is None


def test_no_public_name_is_a_module() -> None:
    for name in (
        "capture",
        "compare",
        "stats",
        "open_run",
        "register_backend",
        "register_sink",
        "register_store",
    ):
        assert f"tlcore.{name}" not in SOURCES


def test_schemas_import_nothing_of_ours() -> None:
    for module, imported in EDGES.items():
        if module.startswith("tlcore_schemas"):
            assert not [name for name in imported if not name.startswith("tlcore_schemas")], module


def test_only_the_vllm_adapter_imports_vllm() -> None:
    for module, (file, is_package) in SOURCES.items():
        if not module.startswith("tlcore.adapters.vllm"):
            package = module if is_package else module.rpartition(".")[0]
            assert not [name for name in imports(file, package) if name.split(".")[0] == "vllm"], module


def test_what_one_kind_of_device_is_called_stands_in_one_place() -> None:
    for module, (file, _) in SOURCES.items():
        if module == "tlcore.engine.staging.accelerator" or not module.startswith("tlcore."):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            asked = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Compare)) else ""
            assert not asked.endswith(".is_cuda") and asked != "torch.cuda", f"{module}: {asked}"
            assert not asked.endswith("== 'cuda'"), f"{module}: {asked}"
