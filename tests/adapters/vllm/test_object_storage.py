"""vLLM writes straight to object storage, and its front end stops when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.adapters.vllm.helpers import ENVIRONMENT, REPOSITORY, run, run_script
from tests.models import tiny_llama
from tests.servers import Server, seaweedfs

pytestmark = pytest.mark.slow

EXAMPLE = "examples/offline_inference/llm_engine_example.py"
READS = """
import sys, tlcore
run = tlcore.open_run(sys.argv[1])
run.verify()
step = run.step(0)
tensor = run.tensor("step_0/model.layers.0/outputs_0_cpu")
print(run.state, run.config["backend"]["format"], tensor.shape[1], len(step.rows), "model" in step.calls)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as running:
        yield running


def backend(server: Server, **changes: object) -> dict[str, object]:
    place = {"name": "fsspec", "url": f"{server.url}/vllm", "format": "safetensors"}
    return {**place, "storage_options": server.options, **changes}


def test_a_run_in_object_storage_is_read_by_a_process_that_has_only_its_url(server: Server) -> None:
    patterns = [r"^model$", r"layers\.0$"]
    config = json.dumps({"backend": backend(server), "module_call_match": patterns})
    done = run(
        EXAMPLE, "--model", str(tiny_llama()), "--enforce-eager", "--max-model-len", "256",
        "--intermediate-log-config", config,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for secret in server.secrets:
        assert secret not in done.stdout + done.stderr
    import fsspec

    filesystem = fsspec.filesystem(server.protocol, skip_instance_cache=True, **server.options)
    (directory,) = filesystem.ls(f"{server.url}/vllm", detail=False)
    credentials = {
        "AWS_ACCESS_KEY_ID": str(server.options["key"]),
        "AWS_SECRET_ACCESS_KEY": str(server.options["secret"]),
        "AWS_ENDPOINT_URL": str(server.options["endpoint_url"]),
    }
    read = subprocess.run(
        [sys.executable, "-c", READS, f"s3://{directory}"],
        cwd=REPOSITORY,
        env={**ENVIRONMENT, **credentials},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert read.returncode == 0, read.stderr[-3000:]
    state, spec, width, rows, whole = read.stdout.split()
    assert (state, spec, width, whole) == ("complete", "safetensors", "128", "True")
    assert int(rows) > 0


@pytest.mark.parametrize("wrong", ["credentials", "bucket", "protocol"])
def test_a_place_that_cannot_be_written_stops_the_front_end(server: Server, wrong: str) -> None:
    changes: dict[str, dict[str, object]] = {
        "credentials": {"storage_options": server.wrong_options},
        "bucket": {"url": "s3://no-such-bucket/vllm"},
        "protocol": {"url": "s33://bucket/vllm", "storage_options": {}},
    }
    config = json.dumps({"backend": backend(server, **changes[wrong])})
    command = (EXAMPLE, "--model", "no-such-model", "--enforce-eager", "--intermediate-log-config", config)
    done = run_script(*command)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    message = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "error: " in message
    for secret in server.secrets:
        assert secret not in done.stdout + done.stderr
