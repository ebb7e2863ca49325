"""Every process that tests start asks for AMX, which vLLM's CPU attention uses without asking."""

from __future__ import annotations

import multiprocessing
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters.vllm.helpers import ENVIRONMENT
from tests.amx import sitecustomize, with_amx
from tests.compat.test_releases import ENVIRONMENT as OTHER_RELEASES

_CPU = Path("/proc/cpuinfo")
HAS_AMX = _CPU.exists() and "amx_tile" in _CPU.read_text()
_ASKED = "import sys; print(sys.modules['sitecustomize'].granted)"


def _module_of_a_child() -> tuple[str | None, bool, bool]:
    module = sys.modules["sitecustomize"]
    return module.__file__, module.granted, module.permitted()


@pytest.mark.skipif(sys.platform != "linux", reason="a request to Linux")
def test_the_request_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    asked: list[tuple[int, int, int]] = []
    for answer, granted in ((0, True), (-1, False)):

        def system_call(*arguments: int, answer: int = answer) -> int:
            asked.append((arguments[0], arguments[1], arguments[2]))
            return answer

        assert sitecustomize.permit_amx(system_call) is granted
    assert asked == [(158, 0x1023, 18)] * 2
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert sitecustomize.permit_amx(system_call) is False
    assert len(asked) == 2


@pytest.mark.parametrize("environment", [ENVIRONMENT, OTHER_RELEASES], ids=["engines", "other releases"])
def test_engines_of_tests_ask_and_run_on_where_there_is_none(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ASKED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == str(HAS_AMX), done.stderr


def test_a_worker_that_is_spawned_asks_by_itself() -> None:
    """As vLLM starts its CPU workers: a permission does not survive the exec in between."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        file, granted, permitted = pool.apply_async(_module_of_a_child).get(60)
    assert file == sitecustomize.__file__
    assert granted is permitted is HAS_AMX


def test_the_directory_stands_in_the_path_once() -> None:
    once = with_amx("/a:/b")
    assert once == with_amx(once) and once.endswith(":/a:/b")
    assert with_amx(None) == with_amx("")
