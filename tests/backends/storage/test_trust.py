"""Where a run may be written: nobody else can plant, read or divert it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore
from tlcore.errors import BackendError, ConfigError
from tlcore_backends.storage.trust import check_trusted

STRANGER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def tmp() -> Iterator[Path]:
    """A directory like ``/tmp``: everybody may write, nobody may remove what is another's."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        place = Path(directory, "tmp")
        place.mkdir()
        place.chmod(0o1777)
        yield place


def capture_into(place: Path | str, backend: str = "pt") -> Path:
    model = nn.Sequential(nn.Linear(2, 2))
    with tlcore.capture(model, output_dir=str(place), backend=backend) as captured:
        model(torch.ones(1, 2))
    assert captured.ledger.stored == 4
    return Path(captured.url)


def strangers_directory(place: Path) -> None:
    place.mkdir(mode=0o777)
    os.chown(place, STRANGER, STRANGER)


def strangers_link(place: Path) -> None:
    target = place.parent.parent / "elsewhere"
    target.mkdir()
    place.symlink_to(target)
    os.lchown(place, STRANGER, STRANGER)


@needs_root
@pytest.mark.parametrize(
    "below", ["vllm_intermediates", "vllm_intermediates/deeper", "vllm_intermediates/a/b"]
)
@pytest.mark.parametrize("plant", [strangers_directory, strangers_link])
def test_what_a_stranger_planted_is_refused_with_advice(
    tmp: Path, plant: Callable[[Path], None], below: str
) -> None:
    plant(tmp / "vllm_intermediates")
    with pytest.raises(BackendError, match=rf"belongs to user {STRANGER}.*choose an output_dir of your own"):
        capture_into(tmp / below)
    assert not any(path.is_file() for path in tmp.parent.rglob("*"))


@needs_root
@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_user_is_refused_another_users_default_directory(tmp: Path, backend: str) -> None:
    """The directory of the first user is no place for the second one, however harmless it looks."""
    capture_into(tmp / "vllm_intermediates", backend)
    seen = os.listdir(tmp / "vllm_intermediates")
    os.seteuid(STRANGER)
    try:
        with pytest.raises(BackendError, match=r"vllm_intermediates"):
            capture_into(tmp / "vllm_intermediates", backend)
        with pytest.raises(PermissionError):
            os.listdir(tmp / "vllm_intermediates")
        own = capture_into(tmp / "mine", backend)
        assert own.stat().st_uid == STRANGER
    finally:
        os.seteuid(0)
    assert os.listdir(tmp / "vllm_intermediates") == seen


@needs_root
def test_the_owner_sees_who_owns_a_directory_of_vllm(tmp: Path) -> None:
    from tlcore.adapters.vllm.frontend.check import _probe_directory

    strangers_directory(tmp / "vllm_intermediates")
    with pytest.raises(BackendError, match=rf"\$\.output_dir: .*belongs to user {STRANGER}"):
        _probe_directory(str(tmp / "vllm_intermediates"), "output_dir")
    _probe_directory(str(tmp / "a" / "b"), "output_dir")
    assert stat.S_IMODE((tmp / "a").stat().st_mode) == stat.S_IMODE((tmp / "a/b").stat().st_mode) == 0o700


def test_a_directory_that_everybody_may_rearrange_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for below in ("open", "open/dumps"):
        with pytest.raises(BackendError, match=r"everybody can write .*open and replace.*chmod \+t"):
            capture_into(tmp_path / below)
    (tmp_path / "open").chmod(0o1777)
    assert capture_into(tmp_path / "open").parent == tmp_path / "open"


def test_links_of_ones_own_and_shared_groups_are_fine(tmp: Path) -> None:
    (tmp / "real").mkdir()
    (tmp / "link").symlink_to(tmp / "real")
    (tmp / "relative").symlink_to("real/../real")
    (tmp / "real").chmod(0o2775)
    for name in ("link", "relative", "real"):
        assert capture_into(tmp / name).is_dir()
    (tmp / "loop").symlink_to(tmp / "loop")
    with pytest.raises(BackendError, match="too many symbolic links"):
        check_trusted(str(tmp / "loop"))


def test_a_planted_run_directory_is_refused(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcore.engine.new_run.new_run_id", lambda: "known")
    (tmp / "out").mkdir()
    (tmp / "elsewhere").mkdir()
    (tmp / "out" / "known").symlink_to(tmp / "elsewhere")
    with pytest.raises(BackendError, match="symbolic link or a file is in the way"):
        capture_into(tmp / "out")
    assert not any((tmp / "elsewhere").iterdir())


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_only_the_owner_can_read_what_is_written(tmp: Path, backend: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        run = capture_into(tmp / "a" / "b", backend)
    finally:
        os.umask(before)
    for path in [tmp / "a", tmp / "a/b", run, *run.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_converted_runs_are_as_private(tmp: Path) -> None:
    run = capture_into(tmp / "a")
    program = [
        sys.executable,
        "-m",
        "tlcore",
        "convert",
        str(run),
        str(tmp / "b"),
        "--backend",
        "safetensors",
    ]
    subprocess.run(program, check=True, capture_output=True, timeout=120)
    for path in [tmp / "b", *(tmp / "b").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_null_byte_in_the_directory_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="output_dir"):
        capture_into("a\0b")
