"""The same steps of the same model are the same on every backend, on real object stores too."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from tests.backends import raw
from tests.servers import Server
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.errors import BackendError
from tlcore.protocols import Sink, Store
from tlcore.record import RunInfo
from tlcore.registry import open_store
from tlcore.testing import SinkConformance, StoreConformance, Tensors, make_run
from tlcore_backends.fsspec import make_sink
from tlcore_backends.storage.remote import FsspecStore

pytestmark = pytest.mark.slow
STEPS = 3
# Captured of each step, aliases included.
TENSORS = 24
_fresh = itertools.count()


class Block(nn.Module):
    """Returns nested containers, repeats a tensor, and calls one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.same = nn.Identity()

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.same(self.linear(x) * scale)
        return {"y": self.same(y.to(torch.bfloat16)), "parts": (y, [y > 0, None]), "scale": scale}


class Model(nn.Module):
    """Two blocks; large enough for a shard that is streamed to the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)["parts"][0], scale=2.0)


def capture(output_dir: str, backend: Any, batch: int = 4) -> str:
    """The URL of a run with three steps of the model, with rows as an adapter would give them."""
    torch.manual_seed(7)
    model = Model()
    config = load_config(output_dir=output_dir, backend=backend, log_step_ids=[])
    session = Session(config, new_run(config))
    session.attach(model)
    for step in range(STEPS):
        x = torch.randn(batch * (10_000 if step == 2 else 1), 8)
        session.begin_step()
        model(x)
        rows = [{"request_id": f"r{step}", "first_row": 0, "rows": batch, "first_position": step}]
        session.end_step(rows=rows)
    session.close()
    counts = session.ledger
    assert counts.balanced
    assert counts.captured == counts.stored == STEPS * TENSORS
    return session.url


def content(store: Store, rows: bool = True) -> dict[str, Any]:
    """All that a run says, in a form that can be compared."""
    documents = raw.step_documents(store)
    return {
        "state": json.loads(store.get("run.json"))["state"],
        "tensors": {
            f"{step}/{name}": (str(tensor.dtype), tuple(tensor.shape), _bytes(tensor))
            for step, tensors in raw.committed(store).items()
            for name, tensor in tensors.items()
        },
        "structures": {step: raw.structures(store, step, document) for step, document in documents},
        "calls": [document["calls"] for _, document in documents],
        "rows": [document["rows"] for _, document in documents if rows],
        "aliases": [
            {record["name"]: record.get("alias_of") for record in document["records"]}
            for _, document in documents
        ],
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The run as the ``pt`` backend writes it to the local disk."""
    found = content(open_store(capture(str(tmp_path_factory.mktemp("reference")), "pt")))
    assert len(found["tensors"]) == STEPS * TENSORS
    assert found["state"] == "complete"
    return found


def test_safetensors_on_the_local_disk(reference: Mapping[str, Any], tmp_path: Path) -> None:
    assert content(open_store(capture(str(tmp_path), "safetensors"))) == reference


@pytest.mark.parametrize("storage_format", ["pt", "safetensors"])
def test_object_storage(reference: Mapping[str, Any], server: Server, storage_format: str) -> None:
    parent = f"{server.url}/every-backend-{next(_fresh)}"
    backend = {"name": "fsspec", "url": parent, "format": storage_format, "storage_options": server.options}
    url = capture(parent, backend)
    store = open_store(url, server.options)
    assert url.startswith(f"{parent}/")
    assert content(store) == reference
    for entry in store.list():
        assert not any(secret.encode() in store.get(entry.name) for secret in server.secrets)
    _open_with_plain_libraries(store, storage_format)


def _open_with_plain_libraries(store: Store, storage_format: str) -> None:
    """A ``.pt`` file opens in plain torch, a segment in plain safetensors."""
    suffix = {"pt": ".pt", "safetensors": ".safetensors"}[storage_format]
    (first, *_) = (e.name for e in store.list() if e.name.endswith(suffix))
    data = store.get(first)
    if storage_format == "pt":
        assert isinstance(torch.load(io.BytesIO(data), weights_only=True), torch.Tensor)
    else:
        assert load_safetensors(data)


LEFT_OPEN = """
import json, sys, torch
from torch import nn
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
config = load_config(json.loads(sys.argv[1]))
run = new_run(config)
session = Session(config, run)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
session.attach(model)
session.begin_step()
model(torch.ones(1000, 64))
session.end_step()
print(run.url)
"""


# Azure's client needs threads that Python no longer gives at that point: there the run must be closed.
@pytest.mark.parametrize("server", ["fake-gcs", "moto", "seaweedfs"], indirect=True)
def test_a_session_left_open_is_stored_when_the_process_ends(server: Server) -> None:
    options = {"name": "fsspec", "url": f"{server.url}/left-open", "storage_options": server.options}
    command = [sys.executable, "-c", LEFT_OPEN, json.dumps({"backend": options})]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = content(open_store(ended.stdout.strip(), server.options), rows=False)
    assert found["state"] == "complete"
    assert len(found["tensors"]) == 6


def _refused(server: Server, url: str, options: dict[str, Any]) -> str:
    backend = {"name": "fsspec", "url": url, "storage_options": options}
    config = load_config(backend=backend)
    with pytest.raises(BackendError) as caught:
        Session(config, new_run(config))
    text = str(caught.value)
    assert "run.json" in text
    assert not any(secret in text for secret in server.secrets)
    return text


def test_a_missing_bucket_is_reported_when_the_run_is_opened(server: Server) -> None:
    if server.name == "seaweedfs":
        # It hides from a role that may not list buckets whether one exists.
        assert "check the credentials" in _refused(server, "s3://no-such-bucket/x", server.options)
    else:
        assert "exist" in _refused(server, f"{server.protocol}://no-such-bucket/x", server.options)


def test_wrong_credentials_are_reported_when_the_run_is_opened(server: Server) -> None:
    if server.wrong_options is None:
        assert server.name in ("moto", "fake-gcs"), "these take any credentials"
        return
    assert "check the credentials" in _refused(server, f"{server.url}/x", server.wrong_options)


class TestStores(StoreConformance):
    """`FsspecStore` on every server."""

    @pytest.fixture(autouse=True)
    def place(self, server: Server) -> None:
        self.server = server

    def make_store(self, tmp_path: Path) -> Store:
        return FsspecStore(f"{self.server.url}/store-{next(_fresh)}", self.server.options)

    def test_a_large_blob_goes_up_in_parts(self, store: Store) -> None:
        data = torch.arange(15 << 20, dtype=torch.int64).numpy().data.cast("B")
        assert store.put("large", [data[:1000], data[1000:]]) == data.nbytes
        assert store.get("large", data.nbytes - 100) == bytes(data[-100:])
        assert next(iter(store.list("lar"))).size == data.nbytes


class TestSinks(SinkConformance):
    """Both formats on every server."""

    @pytest.fixture(autouse=True, params=["pt", "safetensors"])
    def place(self, server: Server, request: pytest.FixtureRequest) -> None:
        self.server, self.storage_format = server, request.param

    def make_sink(self) -> Sink:
        # What is read back here is read without the library.
        return make_sink("pt") if self.storage_format == "pt" else make_sink("safetensors", layout=1)

    def make_run(self, url: str) -> RunInfo:
        return make_run(url, store=FsspecStore(url, self.server.options))

    def make_url(self, tmp_path: Path) -> str:
        return f"{self.server.url}/sink-{next(_fresh)}/run"

    def committed(self, url: str) -> Mapping[int, Tensors]:
        return raw.committed(open_store(url, self.server.options))


@pytest.mark.parametrize("server", ["moto", "seaweedfs"], indirect=True)
class TestObstore(StoreConformance):
    """obstore in the place of s3fs, where the options mean the same to both."""

    @pytest.fixture(autouse=True)
    def place(self, server: Server, no_aws_variables: None) -> None:
        self.server = server
        self.options = {**server.options, "client_kwargs": {"region_name": "us-east-1"}}

    def make_store(self, tmp_path: Path) -> Store:
        return FsspecStore(f"{self.server.url}/obstore-{next(_fresh)}", self.options)

    def test_it_is_used(self, store: Store) -> None:
        assert isinstance(store, FsspecStore)
        assert type(store._filesystem).__name__ == "BucketFilesystem"

    def test_a_range_may_lack_its_end(self, store: Store) -> None:
        store.put("a", [b"123456"])
        assert (store.get("a", 4), store.get("a", 6)) == (b"56", b"")
        with pytest.raises(FileNotFoundError):
            store.get("missing", 4)

    def test_errors_are_the_same(self, store: Store) -> None:
        wrong = {**self.options, "secret": "wrong-secret-for-tests"}
        if self.server.wrong_options is not None:
            with pytest.raises(BackendError, match="check the credentials") as caught:
                FsspecStore(f"{self.server.url}/x", wrong).put("a", [b"x"])
            assert "wrong-secret" not in str(caught.value)
        with pytest.raises(BackendError, match=r"check the credentials|must exist"):
            FsspecStore("s3://no-such-bucket/x", self.options).put("a", [b"x"])

    @pytest.mark.parametrize("storage_format", ["pt", "safetensors"])
    def test_runs_are_the_same(self, reference: Mapping[str, Any], storage_format: str) -> None:
        url = f"{self.server.url}/obstore-{next(_fresh)}"
        backend = {"name": "fsspec", "url": url, "format": storage_format, "storage_options": self.options}
        assert content(open_store(capture(url, backend), self.options)) == reference
