"""``tlcore verify`` and ``tlcore convert`` against reading the same bytes plainly."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import tlcore
from tlcore.config.configuration import load_config
from tlcore.runs.convert import convert

from .capturing import capturing
from .rows import Row, Scale, at_most
from .timing import interleaved, ratio, timed
from .workload import workload

_OTHER = {"pt": "safetensors", "safetensors": "pt"}


def table(scale: Scale) -> list[Row]:
    """One captured prefill per backend: verified, and converted into the other backend."""
    work = workload("prefill", scale)
    rows = []
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        for backend in _OTHER:
            with capturing(work, directory, backend=backend) as capture:
                capture.forward()
            rows += _rows(capture.path, backend, directory, scale)
    return rows


def _rows(run: Path, backend: str, directory: Path, scale: Scale) -> list[Row]:
    times = interleaved(
        {
            "reading": lambda: _read_s(run),
            "verify": lambda: timed(lambda: tlcore.open_run(run).verify()),
            "convert": lambda: _convert_s(run, _OTHER[backend], directory),
            "copying": lambda: _copy_s(run, directory),
        },
        scale.repeats,
    )
    what = {"verify": f"verify, {backend}", "convert": f"convert, {backend} to {_OTHER[backend]}"}
    figures = {name: f"{sorted(seconds)[len(seconds) // 2] * 1e3:.0f} ms" for name, seconds in times.items()}
    return [
        Row(
            f"{what[name]} / reading the same bytes",
            ratio(times, name, "reading"),
            at_most(1.5),
            "times",
            f"{figures[name]} / {figures['reading']}; copying the files takes {figures['copying']}",
        )
        for name in what
    ]


def _files(run: Path) -> list[Path]:
    """Every file of a run, one name of each."""
    return list({file.stat().st_ino: file for file in sorted(run.rglob("*")) if file.is_file()}.values())


def _read_s(run: Path) -> float:
    """Seconds in which one thread reads every file whole, one after the other."""
    files = _files(run)

    def read() -> None:
        for file in files:
            with file.open("rb") as opened:
                opened.read()

    return timed(read)


def _convert_s(run: Path, backend: str, directory: Path) -> float:
    target = directory / "converted"
    config = load_config(output_dir=str(target), backend=backend)
    seconds = timed(lambda: convert(tlcore.open_run(run), config))
    shutil.rmtree(target)
    return seconds


def _copy_s(run: Path, directory: Path) -> float:
    """Seconds in which one thread copies every file into one directory."""
    target = directory / "copied"
    target.mkdir()
    files = _files(run)

    def copy() -> None:
        for index, file in enumerate(files):
            shutil.copyfile(file, target / str(index))

    seconds = timed(copy)
    shutil.rmtree(target)
    return seconds
