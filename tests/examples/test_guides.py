"""The README and every guide run as they stand: their commands in a shell, their snippets in Python."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from tests.amx import with_amx
from tests.documents import EXAMPLES, GUIDES, README, ROOT, Session, blocks
from tests.models import tiny_llama
from tests.servers import free_ports, moto

pytestmark = pytest.mark.slow

# The guide's own patience is 300 s.
START_SECONDS = 600
# The wheel of vLLM for CPUs has another name than the one whose version vLLM's own command asks for.
VLLM = """#!/bin/sh
# vllm serve MODEL ...
shift
model=$1
shift
exec {python} -m vllm.entrypoints.openai.api_server --model "$model" "$@"
"""


def needing(page: Path, needs: str) -> bool:
    return any(block.needs == needs and block.language != "json" for block in blocks(page))


@pytest.mark.parametrize(
    "page", [page for page in (README, *GUIDES) if needing(page, "")], ids=lambda page: page.name
)
def test_a_page_runs_from_its_first_block_to_its_last(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session(tmp_path)
    for block in blocks(page):
        if block.language in ("python", "sh") and block.needs == "":
            session.run(block)


@pytest.fixture
def bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_aws_variables: None
) -> Iterator[fsspec.AbstractFileSystem]:
    """A bucket of the name in the guides, which the environment alone leads to."""
    with moto(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.options["endpoint_url"])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.options["key"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.options["secret"])
        files = fsspec.filesystem("s3", skip_instance_cache=True, **server.options)
        files.mkdir("bucket")
        yield files


def test_what_needs_a_bucket_runs(
    bucket: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for page in GUIDES:
        session = Session(tmp_path)
        for block in blocks(page):
            if block.needs == "s3":
                session.run(block)
    assert len(bucket.ls("bucket/runs")) == 2
    assert len(os.listdir(tmp_path / "local")) == 1


def test_what_needs_an_engine_runs(tmp_path: Path) -> None:
    pages = [
        EXAMPLES / name for name in ("vllm.md", "requests.md", "reading.md", "datasets.md", "comparing.md")
    ]
    assert {page for page in (README, *GUIDES) if needing(page, "vllm")} == set(pages)
    done = subprocess.run(
        [sys.executable, "-m", "tests.documents", "vllm", *map(str, pages)],
        cwd=tmp_path,
        env=_vllm_environment(PYTHONPATH=with_amx(str(ROOT))),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compared = done.stdout.partition("--- examples/comparing.md")[2]
    assert "the runs agree" in compared and "born in scaled_dot_product_attention at" in compared


def test_what_needs_a_server_runs(tmp_path: Path) -> None:
    port = str(free_ports(1)[0])
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(VLLM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    # The first guide starts the server, the other goes on with it.
    pages = [EXAMPLES / name for name in ("vllm.md", "requests.md")]
    assert {page for page in (README, *GUIDES) if needing(page, "server")} == set(pages)
    asked = "".join(block.text for page in pages for block in blocks(page) if block.needs == "server")
    text = asked.replace("--api-key", f"--port {port} --api-key").replace(":8000", f":{port}")
    environment = _vllm_environment(PATH=f"{program.parent}:{os.environ['PATH']}")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-ec", text],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=START_SECONDS)
        finally:
            # The server is left in the background, in the shell's own session.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    shown = log.read_text(errors="replace")
    assert status == 0, shown
    for word in ('"state":"running"', '"state":"closed"', 'tlcore_running{rank="0"}'):
        assert word in shown, f"{word} is not in\n{shown}"


def _vllm_environment(**more: str) -> dict[str, str]:
    usual = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "MODEL": str(tiny_llama())}
    return {**os.environ, **usual, **more}
