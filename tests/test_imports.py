"""The direction of imports, read from the syntax tree: lower layers never import higher ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS: list[set[str]] = [
    {"errors"},
    {"names", "rendering"},
    {"record"},
    {"protocols"},
    {"filters", "fingerprint", "forms", "jsontext", "registry", "schema", "statistics"}
    | {"structure", "validation"},
    {"device_statistics", "host_memory", "host_statistics", "sites"},
    {"batch", "device_staging", "plans"},
    {"examiner", "staging"},
    {"pipeline"},
    {"collector"},
    {"cutting", "hooks", "reader"},
    {"bracket", "runs"},
    {"convert", "filesystem", "prune", "session"},
    {"capture_context"},
    {"__main__", "adapters", "cli", "compare_il", "comparison", "testing", "vllm"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FOR_BACKENDS = {"errors", "names", "record", "rendering", "protocols"}


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


def sources(folder: Path) -> list[tuple[Path, str]]:
    """Each Python file below a folder, with the dotted name of the package it is in."""
    return [
        (file, ".".join(file.relative_to(folder.parent).parent.parts))
        for file in sorted(folder.rglob("*.py"))
    ]


def test_every_module_of_the_engine_has_a_layer() -> None:
    modules = {
        path.stem
        for path in (ROOT / "tlcore").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("layer", sorted(set(LEVEL)))
def test_the_engine_imports_downwards(layer: str) -> None:
    for file, package in sources(ROOT / "tlcore"):
        parts = file.relative_to(ROOT / "tlcore").with_suffix("").parts
        if parts[0] != layer:
            continue
        for name in imports(file, package):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            assert top != "tlcore_backends", f"{file} imports {name}: backends are found by name"
            if top == "tlcore" and target in LEVEL and target != layer:
                assert LEVEL[target] <= LEVEL[layer], f"{file} imports {name} from a higher layer"


def test_modules_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {name: set() for name in LEVEL}
    for file, package in sources(ROOT / "tlcore"):
        own = file.relative_to(ROOT / "tlcore").with_suffix("").parts[0]
        targets = {name.split(".")[1] for name in imports(file, package) if name.startswith("tlcore.")}
        edges.setdefault(own, set()).update((targets & set(LEVEL)) - {own})
    while leaves := {name for name, targets in edges.items() if not targets}:
        edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
    assert edges == {}


def test_backends_import_only_the_contracts() -> None:
    for file, package in sources(ROOT / "backends" / "tlcore_backends"):
        for name in imports(file, package):
            if name.split(".")[0] == "tlcore":
                assert name.split(".")[1] in FOR_BACKENDS, f"{file} imports {name}"


def test_schemas_import_nothing_of_ours() -> None:
    for file, package in sources(ROOT / "schemas" / "tlcore_schemas"):
        assert not [
            name for name in imports(file, package) if name.startswith(("tlcore.", "tlcore_backends"))
        ]


def test_only_the_vllm_adapter_imports_vllm() -> None:
    for folder in (
        ROOT / "tlcore",
        ROOT / "backends" / "tlcore_backends",
        ROOT / "schemas" / "tlcore_schemas",
    ):
        for file, package in sources(folder):
            if ROOT / "tlcore" / "adapters" / "vllm" in file.parents:
                continue
            assert not [name for name in imports(file, package) if name.split(".")[0] == "vllm"], file
