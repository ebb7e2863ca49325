"""Wheel, sdist and editable installation: built, installed into a fresh environment, and used there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = {"tlcore": "tlcore", "tlcore_backends": "backends", "tlcore_schemas": "schemas"}
CHECKED = [
    "layout",
    "test_registry.py",
    "config",
    "backends/test_conformance.py",
    "backends/pt",
    "cli/test_main.py",
]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel made from the tree, an sdist, and a wheel made from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    run(*command, out / "tree", "--wheel", ROOT, cwd=out)
    run(*command, out / "sdist", ROOT, cwd=out)
    return {
        "wheel": next((out / "tree").glob("*.whl")),
        "sdist": next((out / "sdist").glob("*.tar.gz")),
        "wheel from sdist": next((out / "sdist").glob("*.whl")),
    }


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The Python of a new environment that sees the installed dependencies, but not this project."""
    home = tmp_path / "fresh"
    venv.create(home, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    # Python reads no .pth file of a directory added in this way, so an editable tlcore there stays unseen.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", *what, cwd=python.parent)


def copy_of_the_tree(tree: Path) -> Path:
    """What an installation is made from, in a place of its own and without an extension built before."""
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def source_files() -> set[str]:
    """What an installation must contain, as names in a wheel."""
    names = set()
    for package, parent in PACKAGES.items():
        folder = ROOT / package if parent == package else ROOT / parent / package
        files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        names |= {f"{package}/{path.relative_to(folder).as_posix()}" for path in files}
    return names


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_the_sources_the_licence_and_nothing_else(built: dict[str, Path]) -> None:
    names = set(contents(built["wheel"]))
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == source_files()
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_sdist_makes_the_same_wheel(built: dict[str, Path]) -> None:
    assert contents(built["wheel"]) == contents(built["wheel from sdist"])


def test_the_wheel_has_the_extension_for_any_python_from_3_11_on(
    built: dict[str, Path], fresh: Path, tmp_path: Path
) -> None:
    assert "-cp311-abi3-linux_" in built["wheel"].name
    install(fresh, built["wheel"])
    assert run(fresh.with_name("tlcore"), "--version", cwd=tmp_path).splitlines()[1] == "C extension"


def test_without_a_compiler_the_wheel_is_pure_python_and_works(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    monkeypatch.setenv("CC", "/nowhere/cc")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, tree, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    install(fresh, wheel)
    shown = run(fresh.with_name("tlcore"), "--version", cwd=tmp_path)
    assert "Python only: the C extension is not used, since it is not built" in shown


def test_the_sdist_has_what_a_packager_needs(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "Makefile", ".ci/run", "tests/test_packaging.py"}
    assert needed <= names
    assert not [name for name in names if "__pycache__" in name or ".venv" in name]


def test_the_wheel_passes_its_tests_from_a_foreign_directory(
    built: dict[str, Path], fresh: Path, tmp_path: Path
) -> None:
    install(fresh, built["wheel"])
    checks = tmp_path / "checks"
    shutil.copytree(ROOT / "tests", checks / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    settings = "[pytest]\npythonpath = .\naddopts = --import-mode=importlib\nmarkers = slow\n"
    (checks / "pytest.ini").write_text(settings)
    where = run(fresh, "-Ic", "import tlcore; print(tlcore.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(fresh.parents[1])
    wanted = [checks / "tests" / name for name in CHECKED]
    shown = run(
        fresh, "-Im", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *wanted, cwd=tmp_path
    )
    assert " passed" in shown


def test_an_installation_has_the_command_and_the_plugins(built: dict[str, Path], fresh: Path) -> None:
    install(fresh, built["wheel from sdist"])
    assert run(fresh.with_name("tlcore"), "--version", cwd=fresh.parent).startswith("tlcore ")
    code = (
        "from importlib.metadata import distribution as d\n"
        "for point in d('tlcore').entry_points: print(point.group, callable(point.load()))"
    )
    vllm = {f"vllm.{kind}_plugins" for kind in ("endpoint", "general", "platform")}
    groups = {"console_scripts", "fsspec.specs", *vllm}
    shown = run(fresh, "-Ic", code, cwd=fresh.parent).splitlines()
    assert set(shown) == {f"{group} True" for group in groups}


def test_an_editable_installation_follows_the_sources(fresh: Path, tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    install(fresh, "--no-build-isolation", "--editable", tree)
    assert run(fresh.with_name("tlcore"), "--version", cwd=tmp_path).splitlines()[1] == "C extension"
    code = (
        "import tlcore, tlcore_backends, tlcore_schemas\n"
        "print(tlcore.__file__, tlcore_schemas.load('run.v1')['title'])"
    )
    assert run(fresh, "-Ic", code, cwd=fresh.parent).startswith(str(tree / "tlcore" / "__init__.py"))
    schema = tree / "schemas" / "tlcore_schemas" / "run.v1.json"
    schema.write_text('{"title": "changed"}')
    assert run(fresh, "-Ic", code, cwd=fresh.parent).split()[-1] == "changed"
