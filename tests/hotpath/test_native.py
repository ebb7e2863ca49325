"""Which half runs, and why: each reason leaves the Python half in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hotpath.halves import native
from tlcore.hotpath import build_hook, hashing
from tlcore.hotpath.native import in_use

SHOW = (
    "from tlcore.hotpath import native, hashing; print(native.in_use()); print(hashing.hex_digests([b'a']))"
)
HASH_OF_A = "a96faf705af16834e6c632b61e964e1f"


def shown(code: str = SHOW, **variables: str) -> list[str]:
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.splitlines()


def test_the_extension_is_of_these_sources() -> None:
    assert build_hook.fingerprint() == native().SOURCES, "build it again: python tlcore/hotpath/build_hook.py"
    assert in_use() == "C extension" and hashing.hex_digests is native().hex_digests


def test_a_variable_switches_the_extension_off() -> None:
    half, digest = shown(TLCORE_NO_EXTENSIONS="1")
    assert half == "Python only: the C extension is not used, since TLCORE_NO_EXTENSIONS is set"
    assert digest == f"['{HASH_OF_A}']" == shown(TLCORE_NO_EXTENSIONS="0")[1]


def test_without_the_function_in_xxhash_hashing_stays_in_python() -> None:
    code = "import xxhash._xxhash\nxxhash._xxhash.__file__ = '/nowhere.so'\n" + SHOW
    assert shown(code, TLCORE_NO_EXTENSIONS="") == [
        "C extension, hashing in Python: xxhash exports no XXH3_128bits",
        f"['{HASH_OF_A}']",
    ]


def test_an_extension_with_another_interface_is_left_out() -> None:
    code = (
        "import sys, types\nother = types.ModuleType('tlcore.hotpath._native')\nother.INTERFACE = 0\n"
        "sys.modules['tlcore.hotpath._native'] = other\n"
    )
    half, digest = shown(code + SHOW, TLCORE_NO_EXTENSIONS="")
    assert "built from other sources" in half and digest == f"['{HASH_OF_A}']"


def test_without_a_compiler_or_headers_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "extension.so"
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(build_hook.CannotBuildError, match="no C compiler"):
        build_hook.build(target)
    monkeypatch.setenv("CC", f"{sys.executable} -c 'raise SystemExit(\"no such header\")'")
    with pytest.raises(build_hook.CannotBuildError, match="no such header"):
        build_hook.build(target)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(build_hook.CannotBuildError, match=r"Python\.h"):
        build_hook.build(target)
    assert not list(tmp_path.iterdir())
