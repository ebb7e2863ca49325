"""The wheels that ``make wheels`` builds: they run without a compiler, and on what they say they run on."""

from __future__ import annotations

import struct
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests import wheels
from tests.test_packaging import install, run

pytestmark = pytest.mark.slow

EXTENSION = "tlcore/hotpath/_native.abi3.so"
# As the ELF header has it.
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    absent = wheels.missing()
    if absent:
        pytest.skip(f"make wheels installs what this needs: {', '.join(absent)}")
    folder = tmp_path_factory.mktemp("wheels")
    return {machine: wheels.build(machine, folder) for machine in wheels.MACHINES}


@pytest.mark.parametrize("machine", wheels.MACHINES)
def test_auditwheel_finds_them_fit_for_an_old_linux(built: dict[str, Path], machine: str) -> None:
    assert f"-cp311-abi3-manylinux2014_{machine}." in built[machine].name
    assert wheels.audit(built[machine]) == f"manylinux_2_17_{machine}"


@pytest.mark.parametrize("machine", wheels.MACHINES)
def test_the_extension_is_of_the_machine_that_the_wheel_names(built: dict[str, Path], machine: str) -> None:
    with zipfile.ZipFile(built[machine]) as archive:
        header = archive.read(EXTENSION)[:20]
    assert header[:4] == b"\x7fELF" and struct.unpack_from("<H", header, 18) == (ELF_MACHINES[machine],)


def test_it_works_in_a_fresh_environment_without_a_compiler(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sysconfig.get_platform().rpartition("-")[2]
    if here not in built:
        pytest.skip(f"there is no wheel for {here}")
    home = tmp_path / "fresh"
    venv.create(home, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = home / "bin" / "python"
    install(python, built[here])
    # Nothing but Python's own programs is found there.
    monkeypatch.setenv("PATH", str(python.parent))
    assert run(python.with_name("tlcore"), "--version", cwd=tmp_path).splitlines()[1] == "C extension"
    code = (
        "import shutil, torch, tlcore, tlcore.hotpath.hashing as h\n"
        "assert not any(map(shutil.which, ('cc', 'gcc', 'clang'))), 'there is a compiler'\n"
        "m = torch.nn.Linear(2, 2)\n"
        "with tlcore.capture(m, output_dir='runs', module_call_match='.*') as c: m(torch.ones(1, 2))\n"
        "print(tlcore.__file__, c.ledger.stored, h.hex_digests([b'a']))"
    )
    shown = run(python, "-Ic", code, cwd=tmp_path)
    assert shown.startswith(str(home)) and "a96faf705af16834e6c632b61e964e1f" in shown
