"""Builds the C extension of the hot path: while a wheel is made, and in place for an editable installation.

Where there is no compiler, no ``Python.h``, or a Python without the limited API of 3.11, the wheel is pure
and the Python path serves. ``python tlcore/hotpath/build_hook.py`` builds in place.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).parent
EXTENSION = "_native.abi3.so"
# Found wherever a build of the same sources is made: no paths, no times, no identifiers in the result.
_FLAGS = (
    "-std=c11 -O2 -g0 -fPIC -shared -fvisibility=hidden -DPy_LIMITED_API=0x030b0000"
    " -Wall -Wextra -Werror=implicit -Wl,--build-id=none"
)


class CannotBuildError(Exception):
    """The extension cannot be built here; the message says why."""


def sources() -> list[Path]:
    """The C files, in a fixed order."""
    return sorted(HERE.glob("*.c"))


def fingerprint() -> str:
    """What the sources are, so that an extension of older ones can be told."""
    hashed = hashlib.sha256()
    for path in (*sources(), *sorted(HERE.glob("*.h"))):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def build(target: Path, flags: str = "") -> Path:
    """Compile the extension into ``target``. Raises CannotBuildError."""
    if sys.version_info < (3, 11) or sys.implementation.name != "cpython":
        raise CannotBuildError("it needs CPython 3.11 or newer")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise CannotBuildError("it does not support free-threaded Python yet")
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise CannotBuildError(f"there is no Python.h in {include} (install Python's development files)")
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    command = [*compiler, *shlex.split(_FLAGS), f'-DTLCORE_SOURCES="{fingerprint()}"', f"-I{include}"]
    command += [*shlex.split(os.environ.get("CFLAGS", "")), *shlex.split(flags)]
    command += [*(path.name for path in sources()), "-o", str(unfinished.absolute())]
    command += shlex.split(os.environ.get("LDFLAGS", ""))
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuildError(f"there is no C compiler ({error})") from error
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise CannotBuildError(f"the compiler said: {done.stderr.strip()[-2000:]}")
    # Renamed, since a process that has the old one loaded must not see it change.
    os.replace(unfinished, target)
    return target


class BuildHook(BuildHookInterface[Any]):
    """What hatchling calls before it makes a wheel or an sdist."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the extension, and name the wheel after it."""
        if self.target_name != "wheel":
            return
        target = Path(self.root) / "tlcore" / "hotpath" / EXTENSION
        try:
            build(target)
        except CannotBuildError as error:
            target.unlink(missing_ok=True)
            self.app.display_warning(f"tlcore's C extension is not built, Python does its work: {error}")
            return
        build_data["artifacts"].append(f"tlcore/hotpath/{EXTENSION}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp311-abi3-{platform}"


if __name__ == "__main__":
    sys.stdout.write(f"{build(HERE / EXTENSION)}\n")
